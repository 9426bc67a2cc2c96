"""Where the time of a training step goes, and how near each part is to what this machine reaches in the same run.

    python -m benchmarks.roofline [--variant ours] [--batch-size 4] [--seq-len 256] [--json F.json]

A row for every shape of a matmul (FLOP/s, beside PyTorch's own matmul of that shape and type alone) and for every
other part (bytes/s, beside a copy of 256 MB). FLOPs are exact; bytes are counted by hand, see `bytes_of`. What the
profiler does not see is Python and the allocation of memory. `bound` is the time of the step if every part ran at its
reference.
"""

import argparse
import math
import sys
import time
from collections import defaultdict
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import fastest, finish, print_row, time_in_turns
from benchmarks.train_throughput import VARIANTS
from benchmarks.training_step import Step, step_parser
from gpt2repro import command

STEPS = 5  # under the profiler
MATMULS = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::baddbmm": 1}  # place of the first matrix
# A part and words of its kernels; the first part with a word in the name of a kernel takes it. The compiler names a
# fused kernel by the operations in it, and fuses what stands side by side: the copies of the weights, for one.
PARTS = {
    "optimizer": ("adamw", "Optimizer."),
    "clip": ("vector_norm", "_foreach_norm", "aten::mul_", "_foreach_mul", "aten::stack", "aten::clamp"),
    "copies and gradient of the head": ("constant_pad_nd", "aten::pad"),
    "loss": ("log_softmax", "nll_loss", "logsumexp"),
    "attention without its matmuls": ("softmax", "attention", "masked_fill"),
    "norms, GELU, residuals, copies": ("layer_norm", "gelu", "sum", "add", "copy", "embedding"),
}
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}


def profiled(step: Step) -> tuple[float, dict[tuple, list[float]], dict[str, float], dict[str, float]]:
    """Mean seconds of a step: all, by shape of a matmul [calls, seconds], by part, by name of every other kernel."""
    cuda = step.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda, record_shapes=True) as profiler:
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        whole = (time.perf_counter() - began) / STEPS
    matmuls: dict[tuple, list[float]] = defaultdict(lambda: [0, 0.0])
    kernels: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages(group_by_input_shape=True):
        name, seconds = event.key, event.self_cpu_time_total / 1e6 / STEPS
        if cuda:  # PyTorch's operations by what they launched, compiled kernels by themselves
            counts = (event.device_type == DeviceType.CPU) != name.startswith("triton_")
            seconds = event.self_device_time_total / 1e6 / STEPS if counts else 0.0
        if name in MATMULS:
            left, right = event.input_shapes[MATMULS[name] :][:2]
            shape = (*left, right[-1])  # (batch,) rows, inner, columns
            matmuls[shape] = [matmuls[shape][0] + event.count / STEPS, matmuls[shape][1] + seconds]
        else:
            kernels[name] += seconds
    parts: dict[str, float] = defaultdict(float)
    for name, seconds in kernels.items():
        parts[next((part for part, words in PARTS.items() if any(word in name for word in words)), "other")] += seconds
    return whole, matmuls, parts, kernels


def bytes_of(step: Step) -> dict[str, int]:
    """Bytes that a step has to move for each part, every tensor of a kernel counted once.

    Of a parameter: AdamW reads four fp32 numbers and writes three; clipping reads a gradient, then reads and writes
    it. Of a matrix 12 bytes more: its copy to bf16, and its gradient's back. Of the head 20: the copy, the gradient,
    and the embedding's gradient that is added to it. Of a logit in bf16: read in the forward, read and written in the
    backward. Of a token, layer and channel: 44 bytes in the forward (two LayerNorms, two residual sums in fp32, a GELU
    of four channels), 70 in the backward (their gradients, and the sums that are the biases').
    """
    n_parameters = sum(parameter.numel() for parameter in step.model.parameters())
    tokens, n_layer, n_embd = step.inputs.numel(), step.shape["n_layer"], step.shape["n_embd"]
    head = step.model.lm_head.weight.numel()
    return {
        "optimizer": 28 * n_parameters,
        "clip": 12 * n_parameters,
        "copies and gradient of the head": 20 * head,
        "loss": 6 * tokens * head // n_embd,
        "norms, GELU, residuals, copies": 114 * tokens * n_layer * n_embd + 12 * 12 * n_layer * n_embd**2,
    }


def matmul_seconds(shape: tuple, step: Step) -> float:
    """Of PyTorch's matmul alone, with the faster layout of its second matrix."""
    *batch, rows, inner, columns = shape
    make = {"device": step.device, "dtype": TYPES[step.variant.precision]}
    left, right = torch.randn(*batch, rows, inner, **make), torch.randn(*batch, inner, columns, **make)
    turned = right.transpose(-1, -2).contiguous().transpose(-1, -2)
    return min(fastest(lambda: left @ right), fastest(lambda: left @ turned))


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a copy of 256 MB, read and written."""
    source = torch.ones(2**26, device=device)  # not zeros: Linux maps one page for all of them
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source))


def measure(arguments: argparse.Namespace) -> dict:
    torch._inductor.config.cpp.enable_kernel_profile = True  # otherwise all kernels of a CPU's graph are one row
    step = Step(VARIANTS[arguments.variant], arguments)
    alone = median(each.clock for each in time_in_turns({"step": step}, rounds=arguments.rounds)["step"])
    whole, matmuls, parts, kernels = profiled(step)
    rate, moved, rows = copy_rate(step.device), bytes_of(step), []

    def add(name: str, seconds: float, work: float | None, reference: float | None, unit: str) -> None:
        row = {"part": name, "seconds": seconds, "work": work, "reference_per_second": reference, "unit": unit}
        rows.append(row)
        cells = [f"{1000 * seconds:.1f}", f"{seconds / whole:.1%}"]
        if work and reference:
            cells += [f"{work / seconds / 1e9:,.1f} G{unit}/s", f"{reference / 1e9:,.1f} G{unit}/s"]
            cells += [f"{work / seconds / reference:.0%}"]
        print_row(name, *(f" {cell}" for cell in cells))

    print_row("part", "ms/step", "share", "reached", "reference", "of it")
    for shape, (calls, seconds) in sorted(matmuls.items(), key=lambda item: -item[1][1]):
        flops = 2 * math.prod(shape)
        name = f"{calls:.0f} matmuls {' x '.join(map(str, shape))}"
        add(name, seconds, calls * flops, flops / matmul_seconds(shape, step), "FLOP")
    for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        add(part, seconds, moved.get(part), rate, "B")
    seen = sum(row["seconds"] for row in rows)
    bound = sum(row["work"] / row["reference_per_second"] if row["work"] else row["seconds"] for row in rows)
    last = {"not seen": whole - seen, "step": whole, "step without the profiler": alone, "bound": bound}
    for name, seconds in last.items():
        print_row(name, f"{1000 * seconds:.1f}", f"{seconds / whole:.1%}")
    slowest = dict(sorted(kernels.items(), key=lambda item: -item[1])[:40])
    return {"benchmark": "roofline", "step_seconds": alone, "profiled_seconds": whole, "bound_seconds": bound,
            "copy_bytes_per_second": rate, "rows": rows, "kernels": slowest}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = step_parser(__doc__)
    parser.add_argument("--variant", default="ours", choices=list(VARIANTS), help="of train_throughput (%(default)s)")
    arguments = parser.parse_args(argv)
    return command.run(lambda: finish(arguments, measure(arguments)))


if __name__ == "__main__":
    sys.exit(main())
