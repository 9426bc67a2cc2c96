"""Runs as pictures and pages: loss curves, benchmarks over tokens, samples, settings, and a table that compares runs.

    python -m gpt2repro.tools.report runs/demo --output curves.png
    python -m gpt2repro.tools.report runs/adamw runs/muon --output curves.png --html report.html
    python -m gpt2repro.tools.report --compare runs/adamw runs/muon

Reads what a run leaves behind (run.json, metrics.jsonl) and needs neither the model nor a GPU. The page is one file
that asks the network for nothing.
"""

import argparse
import base64
import html
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import BinaryIO

import numpy as np
import yaml

from gpt2repro.eval.loading import output_file, run_command
from gpt2repro.run.metrics import read_metrics

# Validation loss of the released GPT-2 124M on FineWeb-Edu, nats per token (build-nanogpt, play.ipynb).
GPT2_FINEWEB_EDU_LOSS = 3.2924
# HellaSwag acc_norm in percent, all 10,042 validation items. GPT-2 124M: build-nanogpt, hellaswag.py. GPT-3 124M:
# Brown et al. 2020, appendix H.
GPT2_HELLASWAG = {"completion": 29.55, "harness": 31.14}
GPT3_HELLASWAG = 33.7
LINES = ("-", "--", ":", "-.")


@dataclass
class Run:
    """What a run folder tells: its settings and its rows, in the order of the steps."""

    name: str
    info: dict
    rows: list[dict] = field(repr=False)

    def losses(self, kind: str) -> list[dict]:
        """The rows of a kind with a loss, which a step that was not finite has not."""
        return [row for row in self.rows if row["kind"] == kind and row.get("loss") is not None]

    def scores(self) -> dict[str, list[dict]]:
        """The rows of every benchmark by its name with the style."""
        by_task: dict[str, list[dict]] = {}
        for row in self.rows:
            if row["kind"] == "eval":
                by_task.setdefault(f"{row['task']} {row['style']}", []).append(row)
        return by_task

    def summary(self) -> dict[str, str]:
        """The figures by which runs are compared, as text."""
        figures = {"steps": f"{self.rows[-1]['step']:,}"}
        if train := self.losses("train"):
            figures["tokens"] = f"{train[-1]['tokens']:,}"
            figures["last train loss"] = f"{train[-1]['loss']:.4f}"
            figures["tokens per second"] = f"{median(row['tokens_per_second'] for row in train):,.0f}"
        if val := self.losses("val"):
            best = min(val, key=lambda row: row["loss"])
            figures["last val loss"] = f"{val[-1]['loss']:.4f}"
            figures["best val loss"] = f"{best['loss']:.4f} at step {best['step']:,}"
        return figures | {task: score_text(rows[-1]) for task, rows in self.scores().items()}


def score_text(row: dict) -> str:
    """The accuracies in percent, the perplexity where there is one, and the number of items."""
    parts = [f"{key} {100 * row[key]:.2f} %" for key in ("acc", "acc_norm") if key in row]
    parts += [f"perplexity {row['perplexity']:.2f}"] if "perplexity" in row else []
    return f"{', '.join(parts)} of {row['n']:,}"


def read_run(folder: str | Path) -> Run:
    """Read a run folder; a run may be writing to it this moment.

    Raises:
        ValueError: no metrics.jsonl, or no rows in it.
        OSError: no run.json.
    """
    folder = Path(folder)
    rows = read_metrics(folder / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{folder} holds no metrics.jsonl with rows: give the folder of a run (its output_dir)")
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return Run(folder.resolve().name, info, rows)


def draw_curves(runs: list[Run], target: str | Path | BinaryIO) -> None:
    """Write the curves of one or several runs as a PNG: losses, and benchmarks where any was measured."""
    from matplotlib.figure import Figure

    columns = 2 if any(run.scores() for run in runs) else 1
    figure = Figure(figsize=(6.4 * columns, 4.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    _draw_losses(panels[0], runs)
    if columns == 2:
        _draw_scores(panels[1], runs)
    for panel in panels:
        panel.set_xlabel("tokens")
        panel.xaxis.set_major_formatter(lambda value, _: short_count(value))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(target, format="png")


def short_count(value: float) -> str:
    """2500000 -> 2.5M"""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def stretches(points: np.ndarray, count: int = 100) -> np.ndarray:
    """A curve (n, 2) as the means of at most `count` stretches of it, which is a calmer curve."""
    return np.array([part.mean(0) for part in np.array_split(points, min(count, len(points)))])


def _draw_losses(panel, runs: list[Run]) -> None:
    for index, run in enumerate(runs):
        train, val = (
            np.array([(row["tokens"], row["loss"]) for row in run.losses(kind)]) for kind in ("train", "val")
        )
        colour = f"C{index}"
        if len(train):
            panel.plot(*train.T, color=colour, alpha=0.25, linewidth=0.8)
            panel.plot(*stretches(train).T, color=colour, linewidth=1.2, alpha=0.8, label=f"{run.name} train")
        if len(val):
            panel.plot(*val.T, color=colour, marker="o", markersize=3, linewidth=1.8, label=f"{run.name} val")
    # The released model's loss is known for this text alone.
    if all("fineweb-edu" in json.dumps(run.info.get("dataset")).lower() for run in runs):
        _draw_mark(panel, GPT2_FINEWEB_EDU_LOSS, f"released GPT-2 124M, {GPT2_FINEWEB_EDU_LOSS}", "--")
    panel.set_ylabel("loss, nats per token")


def _draw_scores(panel, runs: list[Run]) -> None:
    """acc_norm over tokens, or acc where a task has no other; with HellaSwag the released models'."""
    styles = set()
    for index, run in enumerate(runs):
        for number, (task, rows) in enumerate(run.scores().items()):
            tokens = [row["tokens"] for row in rows]
            percent = [100 * row.get("acc_norm", row["acc"]) for row in rows]
            look = {"color": f"C{index}", "linestyle": LINES[number % len(LINES)], "marker": "o", "markersize": 3}
            panel.plot(tokens, percent, **look, label=f"{run.name} {task}")
            styles |= {row["style"] for row in rows if row["task"] == "hellaswag"}
    for style in sorted(styles):
        _draw_mark(panel, GPT2_HELLASWAG[style], f"GPT-2 124M, {style} style, {GPT2_HELLASWAG[style]}", "--")
    if styles:
        _draw_mark(panel, GPT3_HELLASWAG, f"GPT-3 124M, {GPT3_HELLASWAG}", ":")
    panel.set_ylabel("accuracy, % (acc_norm where there is one)")


def _draw_mark(panel, height: float, text: str, line: str) -> None:
    """A published figure, as a grey line with its name."""
    panel.axhline(height, color="#444444", linestyle=line, linewidth=1)
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    panel.annotate(text, (0.0, height), xytext=(3, 2), fontsize=7, color="#444444", **place)


def compare_table(runs: list[Run]) -> list[list[str]]:
    """Rows of text, the first the header: the figures of every run, then the settings in which they differ."""
    summaries = [run.summary() for run in runs]
    # The model's own sizes stand for those that the recipe leaves to a named shape.
    settings = [{**run.info.get("recipe", {}), **run.info.get("model", {}), "output_dir": None} for run in runs]
    table = [["", *(run.name for run in runs)]]
    for name in dict.fromkeys(name for summary in summaries for name in summary):
        table.append([name, *(summary.get(name, "–") for summary in summaries)])
    for name in dict.fromkeys(name for own in settings for name in own):
        values = [str(own.get(name, "–")) for own in settings]
        if len(set(values)) > 1:
            table.append([name, *values])
    return table


def print_table(table: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in (table[0], ["-" * width for width in widths], *table[1:]):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


STYLE_SHEET = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a202c; }
body { max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #e2e8f0; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1.5rem .25rem 0; border-bottom: 1px solid #edf2f7; vertical-align: top; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f7fafc; padding: .75rem 1rem; font-size: .85rem; }
"""


def html_page(runs: list[Run]) -> str:
    """One self-contained page: a table, curves, samples and settings of the runs."""
    picture = io.BytesIO()
    draw_curves(runs, picture)
    title = html.escape(", ".join(run.name for run in runs))
    parts = [
        f"<h1>{title}</h1>",
        _html_table(compare_table(runs)),
        '<h2>Curves</h2><img alt="loss and benchmark curves" src="data:image/png;base64,'
        f'{base64.b64encode(picture.getvalue()).decode()}">',
    ]
    for run in runs:
        name = html.escape(run.name)
        if samples := [row for row in run.rows if row["kind"] == "sample"]:
            texts = "".join(f"<pre>{html.escape(text)}</pre>" for text in samples[-1]["texts"])
            parts.append(f"<h2>Samples of {name} at step {samples[-1]['step']:,}</h2>{texts}")
        settings = html.escape(yaml.safe_dump(run.info, sort_keys=False, allow_unicode=True))
        parts.append(f"<h2>Settings of {name}</h2><pre>{settings}</pre>")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{STYLE_SHEET}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _html_table(table: list[list[str]]) -> str:
    """A table whose first row is its header."""
    rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table]
    rows[0] = rows[0].replace("td>", "th>")
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=[], help="folders of runs")
    parser.add_argument("--output", help="write the curves to this PNG file")
    parser.add_argument("--html", help="write one self-contained page to this file")
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="print a table of the runs")
    arguments = parser.parse_args()
    if not arguments.compare and not (arguments.runs and (arguments.output or arguments.html)):
        parser.error("give runs with --output or --html, or --compare RUN RUN")
    runs = [read_run(folder) for folder in dict.fromkeys([*arguments.runs, *arguments.compare])]
    if arguments.output:
        draw_curves(runs, output_file(arguments.output))
    if arguments.html:
        output_file(arguments.html).write_text(html_page(runs), encoding="utf-8")
    if arguments.compare:
        print_table(compare_table(runs))


if __name__ == "__main__":
    run_command(main)
