"""Reports of runs: loss curves, benchmark scores, samples and settings as a picture, a page or a table.

    python -m gpt2repro.tools.report runs/demo --output curves.png
    python -m gpt2repro.tools.report runs/adamw runs/muon --output curves.png --html report.html
    python -m gpt2repro.tools.report --compare runs/adamw runs/muon
    python -m gpt2repro.tools.report --results gpt2.json gpt2-core.json run.json run-core.json --output board.png
    python -m gpt2repro.tools.report --schedule recipes/demo.yaml --output lr.png

Reads the record and the metrics of a run, also while it trains; needs neither the model nor a GPU. The page is one
file that loads nothing from the network. --results compares what eval's commands measured of any models; --schedule
draws the learning rate of a recipe over its steps.
"""

from gpt2repro import command
from gpt2repro.tools import flags

if command.starting(__name__):
    command.parse_early(lambda: flags.report(__doc__, None))

import base64
import io
import json
import sys
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from string import Template
from typing import Any, BinaryIO

import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from gpt2repro.eval.output import picture_file
from gpt2repro.recipe import Recipe
from gpt2repro.recipe_parser import parse_recipe
from gpt2repro.run.folder import RunFolder
from gpt2repro.tools.leaderboard import board_table, draw_board, read_board
from gpt2repro.train.schedule import lr_at

# Validation loss of the released GPT-2 124M on FineWeb-Edu, nats per token (build-nanogpt, play.ipynb).
GPT2_FINEWEB_EDU_LOSS = 3.2924
# HellaSwag acc_norm in percent, all 10,042 validation items. GPT-2 124M: build-nanogpt, hellaswag.py. GPT-3 124M:
# Brown et al. 2020, appendix H.
GPT2_HELLASWAG = {"completion": 29.55, "harness": 31.14}
GPT3_HELLASWAG = 33.7
LINES = ("-", "--", ":", "-.")
TEMPLATE = Path(__file__).with_name("report_template.html")


@dataclass
class Run:
    """The record of a run and its rows of metrics, in the order of the steps."""

    name: str
    record: dict
    rows: list[dict] = field(repr=False)

    def losses(self, kind: str) -> list[dict]:
        """The rows of a kind with a loss; a step whose loss was not finite has none."""
        return [row for row in self.rows if row["kind"] == kind and row.get("loss") is not None]

    def scores(self) -> dict[str, list[dict]]:
        """The rows of each benchmark, by its task and style."""
        by_task: dict[str, list[dict]] = {}
        for row in self.rows:
            if row["kind"] == "eval":
                name = " ".join(row[key] for key in ("task", "style") if key in row)
                by_task.setdefault(name, []).append(row)
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
            if (bits := val[-1].get("bits_per_byte")) is not None:
                figures["last bits per byte"] = f"{bits:.4f}"
        return figures | {task: score_text(rows[-1]) for task, rows in self.scores().items()}


def score_text(row: dict) -> str:
    """The accuracies in percent, the perplexity where there is one, and the number of items."""
    parts = [f"{key} {100 * row[key]:.2f} %" for key in ("acc", "acc_norm") if key in row]
    parts += [f"perplexity {row['perplexity']:.2f}"] if "perplexity" in row else []
    parts += [f"centered accuracy {row['core']:.4f}"] if "core" in row else []
    return f"{', '.join(parts)} of {row['n']:,}"


def read_run(path: str | Path) -> Run:
    """The run in a folder, which may still train; ValueError where there is none, or none with metrics."""
    folder = RunFolder(path)
    record, rows = folder.record(), folder.rows()
    if record is None or not rows:
        raise ValueError(f"{path} holds no run with metrics: give the folder of a run (its output_dir)")
    return Run(Path(path).resolve().name, record, rows)


# ---- pictures ----------------------------------------------------------------------------------------------


def draw_curves(runs: list[Run], target: str | Path | BinaryIO) -> None:
    """Write the curves of one or several runs as a PNG: losses, and benchmark scores where there are any."""
    columns, short_count = 2 if any(run.scores() for run in runs) else 1, EngFormatter(sep="")
    figure = Figure(figsize=(6.4 * columns, 4.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    _draw_losses(panels[0], runs)
    if columns == 2:
        _draw_scores(panels[1], runs)
    for panel in panels:
        panel.set_xlabel("tokens")
        panel.xaxis.set_major_formatter(lambda value, _: short_count(value).replace("G", "B"))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(target, format="png")


def smooth(points: np.ndarray, count: int = 100) -> np.ndarray:
    """A curve (n, 2) as the means of at most `count` equal parts of it."""
    return np.array([part.mean(0) for part in np.array_split(points, min(count, len(points)))])


def _draw_losses(panel: Any, runs: list[Run]) -> None:
    for index, run in enumerate(runs):
        train, val = (np.array([(row["tokens"], row["loss"]) for row in run.losses(k)]) for k in ("train", "val"))
        colour = f"C{index}"
        if len(train):
            panel.plot(*train.T, color=colour, alpha=0.25, linewidth=0.8)
            panel.plot(*smooth(train).T, color=colour, linewidth=1.2, alpha=0.8, label=f"{run.name} train")
        if len(val):
            panel.plot(*val.T, color=colour, marker="o", markersize=3, linewidth=1.8, label=f"{run.name} val")
    # The released model's loss is known for this text alone.
    if all("fineweb-edu" in json.dumps(run.record["dataset"]).lower() for run in runs):
        _draw_baseline(panel, GPT2_FINEWEB_EDU_LOSS, f"released GPT-2 124M, {GPT2_FINEWEB_EDU_LOSS}", "--")
    panel.set_ylabel("loss, nats per token")


def _draw_scores(panel: Any, runs: list[Run]) -> None:
    """acc_norm over tokens, or acc where a task has no other; for HellaSwag with the released models' scores."""
    styles = set()
    for index, run in enumerate(runs):
        for number, (task, rows) in enumerate(run.scores().items()):
            tokens = [row["tokens"] for row in rows]
            percent = [100 * row[next(key for key in ("acc_norm", "acc", "core") if key in row)] for row in rows]
            look = {"color": f"C{index}", "linestyle": LINES[number % len(LINES)], "marker": "o", "markersize": 3}
            panel.plot(tokens, percent, **look, label=f"{run.name} {task}")
            styles |= {row["style"] for row in rows if row["task"] == "hellaswag"}
    for style in sorted(styles):
        _draw_baseline(panel, GPT2_HELLASWAG[style], f"GPT-2 124M, {style} style, {GPT2_HELLASWAG[style]}", "--")
    if styles:
        _draw_baseline(panel, GPT3_HELLASWAG, f"GPT-3 124M, {GPT3_HELLASWAG}", ":")
    panel.set_ylabel("accuracy, % (acc_norm where there is one; of core the centered accuracy)")


def _draw_baseline(panel: Any, height: float, text: str, line: str) -> None:
    """A published figure, as a grey line with its name."""
    panel.axhline(height, color="#444444", linestyle=line, linewidth=1)
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    panel.annotate(text, (0.0, height), xytext=(3, 2), fontsize=7, color="#444444", **place)


def draw_schedule(recipe: Recipe, png: Path, *, title: str) -> None:
    """Write the learning rate over all steps as a PNG; with Muon the rate of its matrices as a second curve."""
    figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    panel = figure.subplots()
    steps = np.unique(np.linspace(0, recipe.max_steps - 1, 2001).round().astype(int))
    rates = np.array([lr_at(step, recipe) for step in steps])
    panel.plot(steps, rates, label="AdamW")
    if recipe.muon_learning_rate is not None:
        panel.plot(steps, rates * recipe.muon_learning_rate / recipe.learning_rate, label="Muon")
        panel.legend(frameon=False)
    panel.set(xlabel="optimizer step", ylabel="learning rate", title=title, ylim=(0, None))
    panel.grid(alpha=0.25)
    figure.savefig(png)


# ---- text --------------------------------------------------------------------------------------------------


def compare_table(runs: list[Run]) -> list[list[str]]:
    """Rows of text, the first is the header: the figures of every run, then the settings in which they differ."""
    summaries = [run.summary() for run in runs]
    # The model's own sizes replace those that the recipe leaves to a named shape.
    settings = [{**run.record["recipe"], **run.record.get("model", {}), "output_dir": None} for run in runs]
    rows = [[name, *(summary.get(name, "–") for summary in summaries)] for name in _names(summaries)]
    differing = [[name, *(str(own.get(name, "–")) for own in settings)] for name in _names(settings)]
    return [["", *(run.name for run in runs)], *rows, *(row for row in differing if len(set(row[1:])) > 1)]


def _names(dicts: list[dict]) -> list[str]:
    """The keys of all of them, each once, in their order."""
    return list(dict.fromkeys(name for one in dicts for name in one))


def print_table(table: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in (table[0], ["-" * width for width in widths], *table[1:]):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def html_page(runs: list[Run]) -> str:
    """One page without further files: a table, curves, samples and settings of the runs."""
    picture = io.BytesIO()
    draw_curves(runs, picture)
    header, *rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in compare_table(runs)]
    details = []
    for run in runs:
        name, settings = escape(run.name), yaml.safe_dump(run.record, sort_keys=False, allow_unicode=True)
        for sample in [row for row in run.rows if row["kind"] == "sample"][-1:]:
            texts = "".join(f"<pre>{escape(text)}</pre>" for text in sample["texts"])
            details.append(f"<h2>Samples of {name} at step {sample['step']:,}</h2>{texts}")
        details.append(f"<h2>Settings of {name}</h2><pre>{escape(settings)}</pre>")
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(", ".join(run.name for run in runs)), curves=base64.b64encode(picture.getvalue()).decode(),
        table="".join(f"<tr>{row}</tr>" for row in [header.replace("td>", "th>"), *rows]), details="\n".join(details),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    arguments = flags.report(__doc__, argv)

    def work() -> None:
        if arguments.schedule:
            recipe = parse_recipe(["--recipe", arguments.schedule], default=arguments.schedule)
            recipe.check()
            draw_schedule(recipe, picture_file(arguments.output), title=Path(arguments.schedule).stem)
            return
        if arguments.results:
            board = read_board(arguments.results)
            print_table(board_table(board))
            if arguments.output:
                draw_board(board, picture_file(arguments.output))
            return
        runs = [read_run(folder) for folder in dict.fromkeys([*arguments.runs, *arguments.compare])]
        if arguments.output:
            draw_curves(runs, picture_file(arguments.output))
        if arguments.html:
            picture_file(arguments.html).write_text(html_page(runs), encoding="utf-8")
        if arguments.compare:
            print_table(compare_table(runs))

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
