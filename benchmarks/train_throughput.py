"""A training step of this project's model beside the library's GPT-2, each at its best settings, in one process.

    python -m benchmarks.train_throughput                                  # 64 x 1024 on CUDA, 4 x 256 on a CPU
    python -m benchmarks.train_throughput --batch-size 4 --seq-len 512 --memory --json memory.json

The variants take turns, so a ratio is that of neighbouring steps; its median and quartiles over the rounds are shown.
With --memory also what a step holds above parameters, gradients and optimizer state. A table goes to standard output
and one JSON line after it.
"""

import argparse
import gc
import itertools
from dataclasses import replace

import torch

from benchmarks.measuring import Seconds, finish, machine, print_row, spread, time_in_turns
from benchmarks.training_step import HEAD, Step, Variant, cells, resolve_sizes, step_command_line
from eval.loading import run_command

VARIANTS = {
    "ours": Variant(),
    "ours-chunked": Variant(loss="chunked"),
    "ours-eager": Variant(compile_mode=None),
    "ours-eager-chunked": Variant(compile_mode=None, loss="chunked"),
    "ours-recompute": Variant(loss="chunked", recompute=True),
    "ours-flash": Variant(loss="chunked", sdpa_backend="FLASH_ATTENTION"),
    "ours-cudnn": Variant(loss="chunked", sdpa_backend="CUDNN_ATTENTION"),
    "ours-max-autotune": Variant(loss="chunked", compile_mode="max-autotune-no-cudagraphs"),
    "stock": Variant(model="stock"),
    "stock-eager": Variant(model="stock", compile_mode=None),
}
DEFAULT = ("ours", "ours-chunked", "stock", "stock-eager")


def time_what_fits(steps: dict[str, Step], *, rounds: int) -> dict[str, list[Seconds]]:
    """The timings of all steps; where the memory is used up the last ones are left out, down to the first."""
    while True:
        try:
            return time_in_turns(steps, rounds=rounds)[0]
        except torch.OutOfMemoryError:
            if len(steps) == 1:
                raise
            print(f"{steps.popitem()[0]}: left out, the memory is used up")
        gc.collect()
        torch.cuda.empty_cache()


def compare(arguments: argparse.Namespace) -> dict:
    """Speed of every variant, the ratios of ours to the rivals by round, and memory where it is asked for."""
    sizes = resolve_sizes(arguments)
    asked = {name: replace(VARIANTS[name], precision=arguments.precision) for name in arguments.variants}
    steps = {name: Step(variant, sizes) for name, variant in asked.items()}
    seconds = time_what_fits(steps, rounds=arguments.rounds)
    variants = {}
    for name, values in seconds.items():
        clocks, processors = zip(*values, strict=True)
        variants[name] = steps[name].speed(spread(clocks)["median"])
        variants[name] |= {"clock_seconds": clocks, "processor_seconds": processors}
        variants[name] |= steps[name].memory() if arguments.memory else {}
    ratios = {
        f"{ours} / {rival}": {
            measure: spread([theirs[i] / mine[i] for mine, theirs in zip(seconds[ours], seconds[rival], strict=True)])
            for i, measure in enumerate(Seconds._fields)
        }
        for ours, rival in itertools.permutations(seconds, 2)
        if ours.startswith("ours") and (rival.startswith("stock") or rival == "ours")
    }
    settings = {"batch_size": sizes.batch_size, "seq_len": sizes.seq_len, "precision": arguments.precision,
                "model_shape": arguments.model_shape, "rounds": arguments.rounds}  # fmt: skip
    return {"benchmark": "train_throughput", "settings": settings, "variants": variants, "ratios": ratios,
            "machine": machine(sizes.device)}  # fmt: skip


def main() -> None:
    parser = step_command_line(__doc__)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "tf32", "fp32"])
    parser.add_argument("--variants", nargs="+", default=list(DEFAULT), choices=list(VARIANTS))
    parser.add_argument("--memory", action="store_true", help="also measure the memory of a step")
    arguments = parser.parse_args()
    figures = compare(arguments)
    print_row("variant", *HEAD)
    for name, row in figures["variants"].items():
        print_row(name, *cells(row))
    print_row("times as fast, by neighbouring steps", "median", "quartile", "quartile", "by processor")
    for name, ratio in figures["ratios"].items():
        shown = [*(ratio["clock"][key] for key in ("median", "q1", "q3")), ratio["processor"]["median"]]
        print_row(name, *(f"{value:.3f}" for value in shown))
    finish(figures, arguments.json)


if __name__ == "__main__":
    run_command(main)
