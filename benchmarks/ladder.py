"""The optimisations of the lecture, one after another on this machine, each on top of those before it.

    python -m benchmarks.ladder [--batch-size 16] [--seq-len 1024] [--json F.json]

For every optimisation: milliseconds a step, tokens a second, MFU, memory that a step holds above its state, and the
gain over the line before. Beside it stands the gain that the lecture measured on an A100 (A. Karpathy, "Let's
reproduce GPT-2 (124M)", milliseconds a step in its chapter titles). One variant is in memory at a time.
"""

import argparse
import gc
import sys
from dataclasses import replace

import torch

from benchmarks.measuring import finish, print_row, time_in_turns
from benchmarks.training_step import HEAD, Step, Variant, cells, step_parser
from gpt2repro import command

# Name, what it changes, how many times as fast it made the lecture's step (None: not in the lecture).
RUNGS: list[tuple[str, dict, float | None]] = [
    ("fp32", {}, None),
    ("TF32", {"precision": "tf32"}, 1000 / 333),
    ("bf16", {"precision": "bf16"}, 333 / 300),
    ("torch.compile", {"compile_mode": "default"}, 300 / 130),
    ("flash attention", {"attention": "sdpa"}, 130 / 96),
    ("padded vocabulary", {"pad_vocab": 128}, 96 / 93),
    ("fused optimizer", {"fused_optimizer": True}, 93 / 90),
    ("low-memory loss", {"loss": "chunked"}, None),
    ("best known", {"loss": "plain"}, None),  # the low-memory loss saves memory, not time
]
START = Variant(precision="fp32", compile_mode=None, attention="eager", pad_vocab=1, fused_optimizer=False)


def measure(variant: Variant, arguments: argparse.Namespace) -> dict:
    """The figures of one variant, or under "skipped" why there are none."""
    if variant.precision == "tf32" and arguments.device == "cpu":
        return {"skipped": "needs CUDA"}
    torch.compiler.reset()
    gc.collect()  # the variant before
    torch.cuda.empty_cache()
    try:
        step = Step(variant, arguments)
        seconds = time_in_turns({"step": step}, rounds=arguments.rounds)["step"]
        return {**step.speed(seconds), **step.memory()}
    except torch.OutOfMemoryError:
        return {"skipped": f"out of memory at batch size {arguments.batch_size}"}


def climb(arguments: argparse.Namespace) -> dict:
    """A row for every optimisation; `gain` is the time of the last variant that ran, divided by its own."""
    variant, rows, ms_before = START, [], None
    print_row("optimisation", *HEAD, "gain", "lecture's")
    for name, change, lecture_gain in RUNGS:
        variant = replace(variant, **change)
        row = {"rung": name, "lecture_gain": lecture_gain, **measure(variant, arguments)}
        rows.append(row)
        if "skipped" in row:
            print_row(name, row["skipped"])
            continue
        row["gain"] = ms_before / row["ms"] if ms_before else None
        ms_before = row["ms"]
        print_row(name, *cells(row), *(f"{gain:.2f}" if gain else "" for gain in (row["gain"], lecture_gain)))
    return {"benchmark": "ladder", "rungs": rows}


def main(argv: list[str] | None = None) -> int:
    arguments = step_parser(__doc__).parse_args(argv)
    return command.run(lambda: finish(arguments, climb(arguments)))


if __name__ == "__main__":
    sys.exit(main())
