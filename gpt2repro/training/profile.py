"""Where the time of a few steps goes: a trace for chrome://tracing or ui.perfetto.dev, and the ten costliest kernels.

    accelerate launch train_accelerate.py --recipe R.yaml --profile_steps 3      # writes output_dir/profile.json
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED_STEPS = 4  # compilation, the first updates of the allocator, and one step under the profiler
# From about this many FLOPs a byte on a matmul is bound by arithmetic: 989.4 TFLOP/s / 3.35 TB/s = 295 on an H100 SXM,
# 312 / 2.04 = 153 on an A100 80GB SXM (datasheets); the CPUs measured in docs/performance.md turn over far below.
ARITHMETIC_BOUND = 200


def step_profiler(path: Path, *, steps: int, device: torch.device, show: Callable[[str], None]) -> profile:
    """A started profiler of `steps` steps after the first four; call its `step()` after every optimizer step.

    When it has seen them it writes the trace to `path` and shows the table.
    """
    from torch._inductor import config

    config.cpp.enable_kernel_profile = True  # else all kernels of a CPU's graph are one row

    def finish(profiler: profile) -> None:
        profiler.export_chrome_trace(str(path))
        show("\n".join([*costliest(profiler, device), f"trace of {steps} steps in {path}"]))

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    profiler = profile(
        activities=activities,
        schedule=schedule(skip_first=SKIPPED_STEPS - 1, wait=0, warmup=1, active=steps, repeat=1),
        on_trace_ready=finish,
        record_shapes=True,
        with_flops=True,
    )
    profiler.start()
    return profiler


def costliest(profiler: profile, device: torch.device, *, count: int = 10) -> list[str]:
    """The rows of a table: share of all time spent in kernels, calls, TFLOP/s where counted, and what bounds them.

    PyTorch counts the FLOPs of matmuls alone. Those are bound by arithmetic or by bytes according to their shapes;
    attention is not judged; whatever else a step runs does a few operations for each number that it moves.
    """
    on_cuda = device.type == "cuda"
    kernels: dict[str, list[float]] = {}  # name -> microseconds, calls, FLOPs, least FLOPs a byte
    for event in profiler.key_averages(group_by_input_shape=True):
        time = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if event.device_type != torch.autograd.DeviceType.CPU or event.key.startswith(("ProfilerStep", "cuda")):
            continue  # a kernel stands in the row of the operation that started it
        row = kernels.setdefault(event.key, [0.0, 0, 0, math.inf])
        row[0] += time
        row[1] += event.count
        row[2] += event.flops
        if event.flops:
            row[3] = min(row[3], _flops_per_byte(event.input_shapes))
    total = sum(row[0] for row in kernels.values()) or 1.0
    lines = [f"{'kernel':58} {'share':>6} {'calls':>6} {'TFLOP/s':>8}  bound by"]
    for name, (time, calls, flops, intensity) in sorted(kernels.items(), key=lambda item: -item[1][0])[:count]:
        rate = f"{flops / time / 1e6:8.2f}" if flops and time else " " * 8
        if flops and intensity < math.inf:
            bound = "arithmetic" if intensity >= ARITHMETIC_BOUND else "bytes"
        else:
            bound = "" if "attention" in name or not name.startswith(("aten::", "triton", "graph", "cpp")) else "bytes"
        lines.append(f"{name[:58]:58} {time / total:6.1%} {calls:6.0f} {rate}  {bound}")
    return lines


def _flops_per_byte(shapes: list[list[int]]) -> float:
    """Of an (m, k) @ (k, n) in bf16: 2 m k n FLOPs over 2 (m k + k n + m n) bytes; infinite for what is no matmul."""
    matrices = [shape for shape in shapes if len(shape) == 2]
    if len(matrices) < 2 or matrices[-2][1] != matrices[-1][0]:
        return math.inf
    (m, k), (_, n) = matrices[-2:]
    return m * k * n / (m * k + k * n + m * n)
