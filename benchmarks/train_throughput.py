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
import json

import torch

from benchmarks.training_step import (
    Variant,
    add_step_arguments,
    machine,
    make_step,
    resolve_sizes,
    speed,
    spread,
    step_memory,
    time_in_turns,
)
from eval.loading import run_command, write_json

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


def compare(arguments: argparse.Namespace) -> dict:
    """Speed of every variant, the ratios of ours to the rivals by round, and memory where it is asked for."""
    device, shape, batch_size, seq_len = resolve_sizes(arguments)
    steps = {
        name: make_step(
            Variant(**{**vars(VARIANTS[name]), "precision": arguments.precision}),
            shape=shape, batch_size=batch_size, seq_len=seq_len, device=device,
        )
        for name in arguments.variants
    }  # fmt: skip
    seconds = None
    while seconds is None:
        try:
            seconds = time_in_turns(steps, rounds=arguments.rounds)
        except torch.OutOfMemoryError:
            if len(steps) == 1:
                raise
            print(f"{steps.popitem()[0]}: left out, the memory is used up")
            gc.collect()
            torch.cuda.empty_cache()
    variants = {}
    for name, values in seconds.items():
        clocks, processors = zip(*values, strict=True)
        median = spread(clocks)["median"]
        variants[name] = speed(median, shape=shape, tokens=batch_size * seq_len, seq_len=seq_len, device=device)
        variants[name] |= {"clock_seconds": clocks, "processor_seconds": processors}
        if arguments.memory:
            variants[name] |= {f"{key}_bytes": value for key, value in step_memory(steps[name], device).items()}
    ratios = {
        f"{ours} / {rival}": {
            measure: spread([theirs[i] / mine[i] for mine, theirs in zip(seconds[ours], seconds[rival], strict=True)])
            for i, measure in enumerate(("clock", "processor"))
        }
        for ours, rival in itertools.permutations(seconds, 2)
        if ours.startswith("ours") and (rival.startswith("stock") or rival == "ours")
    }
    settings = {"batch_size": batch_size, "seq_len": seq_len, "precision": arguments.precision,
                "model_shape": arguments.model_shape, "rounds": arguments.rounds}  # fmt: skip
    return {"benchmark": "train_throughput", "settings": settings, "variants": variants, "ratios": ratios,
            "machine": machine(device)}  # fmt: skip


def report(figures: dict) -> None:
    """The table for people, the JSON line for machines."""
    print(f"{'variant':20} {'ms/step':>9} {'tokens/s':>10} {'TFLOP/s':>8} {'MFU':>8} {'memory of a step':>17}")
    for name, row in figures["variants"].items():
        mfu = row["mfu"] if isinstance(row["mfu"], str) else f"{row['mfu']:.1%}"
        memory = f"{row['above_state_bytes'] / 1e6:,.0f} MB" if "above_state_bytes" in row else ""
        print(
            f"{name:20} {row['ms']:9.1f} {row['tokens_per_second']:10,.0f} {row['tflops']:8.2f} {mfu:>8} {memory:>17}"
        )
    for name, ratio in figures["ratios"].items():
        clock = ratio["clock"]
        print(
            f"{name:32} {clock['median']:.3f} times as fast (quartiles {clock['q1']:.3f} to {clock['q3']:.3f}), "
            f"{ratio['processor']['median']:.3f} by processor time"
        )
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_arguments(parser)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "tf32", "fp32"])
    parser.add_argument("--variants", nargs="+", default=list(DEFAULT), choices=list(VARIANTS))
    parser.add_argument("--memory", action="store_true", help="also measure the memory of a step")
    arguments = parser.parse_args()
    figures = compare(arguments)
    report(figures)
    if arguments.json:
        write_json(arguments.json, figures)


if __name__ == "__main__":
    run_command(main)
