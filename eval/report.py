"""Runs as pictures and pages: loss curves, HellaSwag over tokens, samples, settings, and a table that compares runs.

    python -m eval.report runs/demo --output curves.png
    python -m eval.report runs/adamw runs/muon --output curves.png --html report.html
    python -m eval.report --compare runs/adamw runs/muon

Reads what a run leaves behind (run.json, metrics.jsonl) and needs neither the model nor a GPU. The page is one file
that asks the network for nothing.
"""

import argparse
import base64
import html
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median

from eval.loading import run_command

# Validation loss of the released GPT-2 124M on FineWeb-Edu, nats per token (build-nanogpt, play.ipynb).
GPT2_FINEWEB_EDU_LOSS = 3.2924
# HellaSwag acc_norm in percent, all 10,042 validation items. GPT-2 124M: build-nanogpt, hellaswag.py. GPT-3 124M:
# Brown et al. 2020, appendix H.
GPT2_HELLASWAG = {"completion": 29.55, "harness": 31.14}
GPT3_HELLASWAG = 33.7
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#718096")


@dataclass
class Run:
    """What a run folder tells: its settings and its rows, one for each (kind, step, task, style)."""

    name: str
    info: dict
    rows: list[dict] = field(repr=False)

    def series(self, kind: str, key: str, axis: str) -> tuple[list[float], list[float]]:
        """(x, y) of all rows of a kind that have a finite `key`."""
        points = [(row[axis], row[key]) for row in self.rows if row["kind"] == kind and row.get(key) is not None]
        return [x for x, _ in points], [y for _, y in points]

    @cached_property
    def on_fineweb_edu(self) -> bool:
        """Whether the loss may be compared with the released GPT-2's."""
        recipe = self.info.get("recipe") or {}
        told = [self.info.get("dataset"), recipe.get("source"), recipe.get("dataset_dir")]
        return "fineweb-edu" in json.dumps(told).lower().replace("_", "-")

    def summary(self) -> dict[str, str]:
        """The figures by which runs are compared, as text."""
        train, val = (self.series(kind, "loss", "step") for kind in ("train", "val"))
        speed = self.series("train", "tokens_per_second", "step")[1]
        last = self.rows[-1]
        figures = {"steps": f"{last['step']:,}", "tokens": f"{max(row['tokens'] or 0 for row in self.rows):,}"}
        figures["last train loss"] = f"{train[1][-1]:.4f}" if train[1] else "–"
        figures["last val loss"] = f"{val[1][-1]:.4f}" if val[1] else "–"
        best = min(zip(val[1], val[0], strict=True), default=None)
        figures["best val loss"] = f"{best[0]:.4f} at step {best[1]:,}" if best else "–"
        figures["tokens per second"] = f"{median(speed):,.0f}" if speed else "–"
        for row in self.rows:  # the last row of a task stands
            if row["kind"] == "eval" and (label := score_label(row)):
                figures[label] = score_text(row)
        return figures


def score_label(row: dict) -> str:
    style = f" ({row['style']})" if row.get("style") else ""
    return f"{row.get('task', 'eval')}{style}"


def score_text(row: dict) -> str:
    """`acc / acc_norm` in percent with the number of items, and the perplexity where there is one."""
    parts = [f"{key} {100 * row[key]:.2f} %" for key in ("acc", "acc_norm") if row.get(key) is not None]
    parts += [f"perplexity {row['perplexity']:.2f}"] if row.get("perplexity") is not None else []
    return ", ".join(parts) + (f" of {row['n']:,}" if row.get("n") else "")


def read_run(folder: str | Path) -> Run:
    """Read a run folder. Where a resumed run wrote a step again, the later row stands.

    Raises:
        ValueError: no metrics.jsonl, no rows in it, or a line that is no row (with its number).
    """
    folder = Path(folder)
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{folder} holds no metrics.jsonl: give the folder of a run (its output_dir)")
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    if lines and not text.endswith("\n"):
        lines.pop()  # the run writes it this moment, or was killed while it did
    rows: dict[tuple, dict] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            key = (row["kind"], int(row["step"]), row.get("task"), row.get("style"), row.get("prompt"))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{file}, line {number}: {line[:80]!r} is no row with "kind" and "step"') from error
        rows.pop(key, None)
        rows[key] = row
    if not rows:
        raise ValueError(f"{file} has no rows yet: wait for the first step of the run")
    tokens_at = {row["step"]: row["tokens"] for row in rows.values() if row.get("tokens") is not None}
    for row in rows.values():
        row.setdefault("tokens", tokens_at.get(row["step"]))
    info_file = folder / "run.json"
    info = json.loads(info_file.read_text(encoding="utf-8")) if info_file.is_file() else {}
    return Run(folder.resolve().name, info, sorted(rows.values(), key=lambda row: row["step"]))


def smooth(values: list[float]) -> list[float]:
    """Mean over a centred window of about a fiftieth of the curve, narrower towards its ends."""
    reach = len(values) // 100
    around = (values[max(0, i - min(reach, i, len(values) - 1 - i)) : i + min(reach, len(values) - 1 - i, i) + 1]
              for i in range(len(values)))  # fmt: skip
    return [sum(window) / len(window) for window in around]


def draw_curves(run_dirs: Iterable[str | Path], png: str | Path) -> None:
    """Write the curves of one or several runs as a PNG: losses, and HellaSwag where it was measured."""
    runs = [read_run(folder) for folder in run_dirs]
    Path(png).parent.mkdir(parents=True, exist_ok=True)
    Path(png).write_bytes(curves_png(runs))


def curves_png(runs: list[Run]) -> bytes:
    """The picture's bytes. The x axis counts tokens where all rows tell them, else steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display and no global state
    from matplotlib.figure import Figure

    drawn = [row for run in runs for row in run.rows if row["kind"] in ("train", "val", "eval")]
    axis = "step" if any(row["tokens"] is None for row in drawn) else "tokens"
    tasks = sorted({score_label(row) for run in runs for row in run.rows if row["kind"] == "eval"})
    columns = 2 if tasks else 1
    figure = Figure(figsize=(6.4 * columns, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, columns, squeeze=False)[0]
    _draw_losses(panels[0], runs, axis)
    if tasks:
        _draw_scores(panels[1], runs, axis)
    for panel in panels:
        panel.set_xlabel("tokens" if axis == "tokens" else "optimizer steps")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
        if axis == "tokens":
            panel.xaxis.set_major_formatter(lambda value, _: short_count(value))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def short_count(value: float) -> str:
    """2500000 -> 2.5M"""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _draw_losses(panel, runs: list[Run], axis: str) -> None:
    for run, colour in zip(runs, _cycle(COLOURS), strict=False):
        x, loss = run.series("train", "loss", axis)
        panel.plot(x, loss, color=colour, alpha=0.25, linewidth=0.8)
        panel.plot(x, smooth(loss), color=colour, linewidth=1.2, alpha=0.8, label=f"{run.name} train")
        x, loss = run.series("val", "loss", axis)
        if x:
            panel.plot(x, loss, color=colour, marker="o", markersize=3, linewidth=1.8, label=f"{run.name} val")
    if all(run.on_fineweb_edu for run in runs):
        panel.axhline(GPT2_FINEWEB_EDU_LOSS, color="#444444", linestyle="--", linewidth=1)
        _name_line(panel, GPT2_FINEWEB_EDU_LOSS, f"released GPT-2 124M, {GPT2_FINEWEB_EDU_LOSS}")
    panel.set_ylabel("loss, nats per token")


def _draw_scores(panel, runs: list[Run], axis: str) -> None:
    """acc_norm of HellaSwag, or of every task (acc where it has no other) if HellaSwag was not measured."""
    rows = [row for run in runs for row in run.rows if row["kind"] == "eval"]
    tasks = sorted({(row.get("task", ""), row.get("style") or "") for row in rows})
    shown = [key for key in tasks if key[0] == "hellaswag"] or tasks
    for run, colour in zip(runs, _cycle(COLOURS), strict=False):
        for (task, style), line in zip(shown, _cycle(("-", "--", ":", "-.")), strict=False):
            mine = [row for row in run.rows if row["kind"] == "eval" and row.get("task") == task]
            mine = [row for row in mine if (row.get("style") or "") == style and row.get("acc") is not None]
            y = [100 * (row["acc"] if row.get("acc_norm") is None else row["acc_norm"]) for row in mine]
            label = " ".join(filter(None, [run.name, task, style]))
            panel.plot([row[axis] for row in mine], y, line, color=colour, marker="o", markersize=3, label=label)
    if shown and shown[0][0] == "hellaswag":
        for style in sorted({style for _, style in shown} & GPT2_HELLASWAG.keys()):
            panel.axhline(GPT2_HELLASWAG[style], color="#444444", linestyle="--", linewidth=1)
            _name_line(panel, GPT2_HELLASWAG[style], f"GPT-2 124M, {style} style, {GPT2_HELLASWAG[style]}")
        panel.axhline(GPT3_HELLASWAG, color="#444444", linestyle=":", linewidth=1)
        _name_line(panel, GPT3_HELLASWAG, f"GPT-3 124M, {GPT3_HELLASWAG}")
    panel.set_ylabel("HellaSwag acc_norm, %" if shown and shown[0][0] == "hellaswag" else "accuracy, %")


def _name_line(panel, height: float, text: str) -> None:
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    panel.annotate(text, (0.0, height), xytext=(3, 2), fontsize=7, color="#444444", **where)


def _cycle(values):
    while True:
        yield from values


def compare_table(runs: list[Run]) -> list[list[str]]:
    """Rows of text, the first the header: the figures of every run, then the settings in which they differ."""
    summaries = [run.summary() for run in runs]
    names = list(dict.fromkeys(name for summary in summaries for name in summary))
    table = [["", *(run.name for run in runs)]]
    table += [[name, *(summary.get(name, "–") for summary in summaries)] for name in names]
    recipes = [run.info.get("recipe") or {} for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    for key in keys:
        values = [recipe.get(key, "–") for recipe in recipes]
        if key != "output_dir" and any(value != values[0] for value in values):
            table.append([key, *map(str, values)])
    return table


def print_table(table: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for index, row in enumerate(table):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if index == 0:
            print("  ".join("-" * width for width in widths))


STYLE_SHEET = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a202c; }
body { max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #e2e8f0; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1.5rem .25rem 0; border-bottom: 1px solid #edf2f7; vertical-align: top; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f7fafc; padding: .75rem 1rem; font-size: .85rem; }
.quiet { color: #718096; font-size: .85rem; }
"""


def html_page(runs: list[Run]) -> str:
    """One self-contained page: tables, curves, samples and settings of the runs."""
    picture = base64.b64encode(curves_png(runs)).decode()
    title = ", ".join(run.name for run in runs)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _html_table(compare_table(runs), header=True),
        f'<h2>Curves</h2><img alt="loss and benchmark curves" src="data:image/png;base64,{picture}">',
    ]
    for run in runs:
        name = html.escape(run.name)
        samples = [row for row in run.rows if row["kind"] == "sample"]
        if samples:
            last = [row for row in samples if row["step"] == samples[-1]["step"]]
            texts = "".join(f"<pre>{html.escape(text)}</pre>" for row in last for text in row.get("texts", []))
            parts.append(f"<h2>Samples of {name} at step {samples[-1]['step']:,}</h2>{texts}")
        settings = [[key, value if isinstance(value, str) else json.dumps(value)] for key, value in _flat(run.info)]
        if settings:
            parts.append(f"<h2>Settings of {name}</h2>{_html_table(settings)}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{STYLE_SHEET}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _flat(tree: dict, prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _html_table(table: list[list[str]], *, header: bool = False) -> str:
    tags = ["th" if header and index == 0 else "td" for index in range(len(table))]
    lines = zip(table, tags, strict=True)
    rows = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for row, tag in lines)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders of runs")
    parser.add_argument("--output", help="write the curves to this PNG file")
    parser.add_argument("--html", help="write one self-contained page to this file")
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="print a table of these runs")
    arguments = parser.parse_args()
    if not arguments.compare and not (arguments.runs and (arguments.output or arguments.html)):
        parser.error("give runs with --output or --html, or --compare RUN RUN")
    runs = [read_run(folder) for folder in arguments.runs]
    if arguments.output:
        draw_curves(arguments.runs, arguments.output)
    if arguments.html:
        Path(arguments.html).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.html).write_text(html_page(runs), encoding="utf-8")
    if arguments.compare:
        print_table(compare_table([read_run(folder) for folder in arguments.compare]))


if __name__ == "__main__":
    run_command(main)
