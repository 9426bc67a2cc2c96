"""The lecture's ladder on this machine: one optimisation a rung, each on top of those before it.

    python -m benchmarks.ladder [--batch-size 16] [--seq-len 1024] [--json F.json] [--png F.png]

Every rung: milliseconds a step, tokens a second, MFU, what a step holds above its state, and the gain over the rung
before, beside the gain that the lecture measured on an A100 (A. Karpathy, "Let's reproduce GPT-2 (124M)", milliseconds
a step in its chapter titles). A rung that this device cannot take says so. One variant is in memory at a time.
"""

import argparse
import gc
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

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


def climb(arguments: argparse.Namespace) -> dict:
    """A row for every rung; `gain` is the time of the rung before over its own."""
    device, shape, batch_size, seq_len = resolve_sizes(arguments)
    variant, rows, before, lecture_before = START, [], None, None
    for name, change, lecture_ms in RUNGS:
        variant = replace(variant, **change)
        both = lecture_before and lecture_ms
        row: dict = {"rung": name, "lecture_gain": lecture_before / lecture_ms if both else None}
        lecture_before = lecture_ms
        if variant.precision == "tf32" and device.type != "cuda":
            rows.append({**row, "skipped": "needs CUDA"})
            continue
        torch.compiler.reset()
        step = make_step(variant, shape=shape, batch_size=batch_size, seq_len=seq_len, device=device)
        try:
            seconds = time_in_turns({name: step}, rounds=arguments.rounds)[name]
            memory = step_memory(step, device)
        except torch.OutOfMemoryError:
            rows.append({**row, "skipped": f"out of memory at batch size {batch_size}"})
            before = None
            continue
        finally:
            del step
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        clock = spread([second.clock for second in seconds])
        row |= speed(clock["median"], shape=shape, tokens=batch_size * seq_len, seq_len=seq_len, device=device)
        row |= {"q1_ms": 1000 * clock["q1"], "q3_ms": 1000 * clock["q3"], **memory}
        row["gain"] = before / clock["median"] if before else None
        before = clock["median"]
        rows.append(row)
        print(line(row), flush=True)
    settings = {"batch_size": batch_size, "seq_len": seq_len, "model_shape": arguments.model_shape}
    return {"benchmark": "ladder", "settings": settings, "rungs": rows, "machine": machine(device)}


def line(row: dict) -> str:
    """One rung of the table."""
    if "skipped" in row:
        return f"{row['rung']:18} {row['skipped']}"
    mfu = row["mfu"] if isinstance(row["mfu"], str) else f"{row['mfu']:.1%}"
    memory = f"{row['above_state'] / 1e6:,.0f} MB" if "above_state" in row else ""
    gain, lecture = (f"{row[key]:.2f}" if row[key] else "" for key in ("gain", "lecture_gain"))
    rate = f"{row['ms']:9.1f} {row['tokens_per_second']:10,.0f}"
    return f"{row['rung']:18} {rate} {mfu:>8} {memory:>12} {gain:>6} {lecture:>8}"


def draw(figures: dict, png: str | Path) -> None:
    """Tokens a second of every rung as bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in figures["rungs"] if "ms" in row]
    figure = Figure(figsize=(7.2, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    bars = panel.barh([row["rung"] for row in rows], [row["tokens_per_second"] for row in rows], color="#4878a8")
    panel.bar_label(bars, [f"{row['tokens_per_second']:,.0f}" for row in rows], padding=3)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    settings = figures["settings"]
    panel.set(
        xlabel="tokens a second",
        title=f"{settings['model_shape']}, {settings['batch_size']} x {settings['seq_len']} tokens, "
        f"{figures['machine']['hardware']}",
    )
    Path(png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_arguments(parser)
    parser.add_argument("--png", help="draw the tokens a second into this file")
    arguments = parser.parse_args()
    print(f"{'rung':18} {'ms/step':>9} {'tokens/s':>10} {'MFU':>8} {'memory':>12} {'gain':>6} {'lecture':>8}")
    figures = climb(arguments)
    for row in figures["rungs"]:
        if "skipped" in row:
            print(line(row))
    print(json.dumps(figures))
    if arguments.json:
        write_json(arguments.json, figures)
    if arguments.png and find_spec("matplotlib"):  # which a bare GPU machine may not have
        draw(figures, arguments.png)


if __name__ == "__main__":
    run_command(main)
