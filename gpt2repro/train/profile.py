"""Where the time of a few steps goes: a trace for chrome://tracing or ui.perfetto.dev, and PyTorch's table of kernels.

    accelerate launch train_accelerate.py --recipe R.yaml --profile_steps 3      # writes output_dir/profile.json
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED_STEPS = 4  # compilation, the first updates of the allocator, and one step under the profiler
ROWS = 10


def step_profiler(
    path: Path, *, steps: int, left: int, device: torch.device, show: Callable[[str], None]
) -> profile | None:
    """A started profiler of `steps` steps after the next four; call its `step()` after every optimizer step.

    When it has seen them it writes the trace to `path` and shows the ROWS costliest kernels, with TFLOPs where PyTorch
    counts them (matmuls). None, and a line that says so, where a resumed run has too few steps `left`.
    """
    from torch._inductor import config

    if left < SKIPPED_STEPS + steps:
        show(f"no profile: profile_steps={steps} follow {SKIPPED_STEPS} other steps, and {left} are left")
        return None

    config.cpp.enable_kernel_profile = True  # otherwise all kernels of a CPU's graph are one row
    cuda = device.type == "cuda"

    def finish(profiler: profile) -> None:
        profiler.export_chrome_trace(str(path))
        order = "self_device_time_total" if cuda else "self_cpu_time_total"
        show(profiler.key_averages().table(sort_by=order, row_limit=ROWS) + f"trace of {steps} steps in {path.name}")

    profiler = profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda,
        schedule=schedule(skip_first=SKIPPED_STEPS - 1, wait=0, warmup=1, active=steps, repeat=1),
        on_trace_ready=finish,
        with_flops=True,
    )
    profiler.start()
    return profiler
