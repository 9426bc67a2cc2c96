"""The lecture's ladder on this machine: one optimisation a rung, each on top of those before it.

    python -m benchmarks.ladder [--batch-size 16] [--seq-len 1024] [--json F.json] [--png F.png]

Every rung: milliseconds a step, tokens a second, MFU, what a step holds above its state, and the gain over the rung
before, beside the gain that the lecture measured on an A100 (A. Karpathy, "Let's reproduce GPT-2 (124M)", milliseconds
a step in its chapter titles). A rung that this device cannot take says so. One variant is in memory at a time.
"""

import argparse
import gc
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.measuring import finish, machine, print_row, spread, time_in_turns
from benchmarks.training_step import HEAD, Sizes, Step, Variant, cells, resolve_sizes, step_command_line
from eval.loading import run_command

# Rung, what it changes, milliseconds a step of the lecture (None: not in it).
RUNGS: list[tuple[str, dict, float | None]] = [
    ("fp32", {}, 1000),
    ("TF32", {"precision": "tf32"}, 333),
    ("bf16", {"precision": "bf16"}, 300),
    ("torch.compile", {"compile_mode": "default"}, 130),
    ("flash attention", {"attention": "sdpa"}, 96),
    ("padded vocabulary", {"pad_vocab": 128}, 93),
    ("fused optimizer", {"fused_optimizer": True}, 90),
    ("low-memory loss", {"loss": "chunked"}, None),
    ("best known", {"loss": "plain"}, None),  # the low-memory loss buys memory, not speed
]
START = Variant(precision="fp32", compile_mode=None, attention="eager", pad_vocab=1, fused_optimizer=False)


def measure(variant: Variant, sizes: Sizes, *, rounds: int) -> dict:
    """The figures of one rung, or why there are none."""
    if variant.precision == "tf32" and sizes.device.type != "cuda":
        return {"skipped": "needs CUDA"}
    torch.compiler.reset()
    gc.collect()  # the rung before
    torch.cuda.empty_cache()
    try:
        step = Step(variant, sizes)
        seconds, _ = time_in_turns({"step": step}, rounds=rounds)
        clock = spread([each.clock for each in seconds["step"]])
        quartiles = {"q1_ms": 1000 * clock["q1"], "q3_ms": 1000 * clock["q3"]}
        return {**step.speed(clock["median"]), **quartiles, **step.memory()}
    except torch.OutOfMemoryError:
        return {"skipped": f"out of memory at batch size {sizes.batch_size}"}


def climb(arguments: argparse.Namespace) -> dict:
    """A row for every rung, printed as it comes; `gain` is the time of the last rung that ran over its own."""
    sizes = resolve_sizes(arguments)
    variant, rows, ms_before, lecture_before = START, [], None, None
    print_row("rung", *HEAD, "gain", "lecture's")
    for name, change, lecture_ms in RUNGS:
        variant = replace(variant, **change)
        row = {"rung": name, **measure(variant, sizes, rounds=arguments.rounds)}
        row["lecture_gain"] = lecture_before / lecture_ms if lecture_before and lecture_ms else None
        lecture_before = lecture_ms
        rows.append(row)
        if "skipped" in row:
            print_row(name, row["skipped"])
            continue
        row["gain"] = ms_before / row["ms"] if ms_before else None
        ms_before = row["ms"]
        print_row(name, *cells(row), *(f"{row[gain]:.2f}" if row[gain] else "" for gain in ("gain", "lecture_gain")))
    settings = {"batch_size": sizes.batch_size, "seq_len": sizes.seq_len, "model_shape": arguments.model_shape}
    return {"benchmark": "ladder", "settings": settings, "rungs": rows, "machine": machine(sizes.device)}


def draw(figures: dict, png: Path) -> None:
    """Tokens a second of every rung as bars."""
    from matplotlib.figure import Figure

    rows = [row for row in figures["rungs"] if "ms" in row]
    settings = figures["settings"]
    figure = Figure(figsize=(7.2, 3.6), dpi=150, layout="constrained")
    panel = figure.subplots()
    bars = panel.barh([row["rung"] for row in rows], [row["tokens_per_second"] for row in rows], color="#4878a8")
    panel.bar_label(bars, fmt="{:,.0f}", padding=3)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    size = f"{settings['model_shape']}, {settings['batch_size']} x {settings['seq_len']} tokens"
    panel.set(xlabel="tokens a second", title=f"{size}, {figures['machine']['hardware']}")
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png)


def main() -> None:
    parser = step_command_line(__doc__)
    parser.add_argument("--png", type=Path, help="draw the tokens a second into this file")
    arguments = parser.parse_args()
    figures = climb(arguments)
    if arguments.png and find_spec("matplotlib"):  # which a bare GPU machine may not have
        draw(figures, arguments.png)
    finish(figures, arguments.json)


if __name__ == "__main__":
    run_command(main)
