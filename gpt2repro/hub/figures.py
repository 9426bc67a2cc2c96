"""What was measured of a checkpoint: by its run while it trained, and by `python -m eval.…` afterwards."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

METRICS = ("acc", "acc_norm", "loss", "perplexity", "bits_per_byte")
# The fields that show that a JSON file is one of eval's: of a benchmark, of a validation.
BENCHMARK, VALIDATION = {"model", "task", "acc", "n"}, {"model", "measured_on", "loss", "tokens"}

Figures = dict[tuple[str, str | None], dict[str, Any]]  # by task or dataset, and style


def run_figures(rows: list[dict[str, Any]], *, dataset: str) -> Figures:
    """The last validation, on `dataset`, and the last score of each benchmark in the rows of a run."""
    figures: Figures = {}
    for row in rows:
        if row["kind"] == "val":
            figures[dataset, None] = {**row, "tokens": row["eval_tokens"]}
        elif row["kind"] == "eval":
            figures[row["task"], row.get("style")] = row
    return figures


def file_figures(checkpoint: Path, *, saved_at: float) -> Figures:
    """The figures in JSON files of eval: those in the checkpoint's folder, and those beside it that name it.

    One beside it must be newer than `saved_at`: a figure of an older `latest` is not of this checkpoint.
    """
    beside = [file for file in checkpoint.parent.glob("*.json") if file.stat().st_mtime >= saved_at]
    figures: Figures = {}
    for file in [*sorted(beside), *sorted(checkpoint.glob("*.json"))]:
        figure = read_json(file)
        of_eval = BENCHMARK <= figure.keys() or VALIDATION <= figure.keys()
        if of_eval and (file.parent == checkpoint or Path(figure["model"]).resolve() == checkpoint):
            name = figure["task"] if "task" in figure else Path(figure["measured_on"]).name
            figures[name, figure.get("style")] = figure
    return figures


def eval_results(figures: Figures, *, step: int | None, on_hub: dict[str, dict[str, str]]) -> Iterator[EvalResult]:
    """A result of the model card for each metric of each figure; one of another step than `step` says so.

    `on_hub` is what the Hub calls a dataset ("path", "name", "split") for figures that do not say it themselves.
    """
    for (name, style), figure in figures.items():
        dataset = figure.get("dataset") or on_hub.get(name) or {"path": name}
        count = f"{figure['n']:,} items" if "task" in figure else f"{figure['tokens']:,} tokens"
        when = f" at step {figure['step']:,}" if figure.get("step", step) != step else ""
        for metric in METRICS:
            value, error = figure.get(metric), figure.get(f"{metric}_stderr")
            if isinstance(value, float) and math.isfinite(value):
                what = ", ".join(filter(None, [metric, style and f"{style} style", count])) + when
                yield EvalResult(
                    task_type="text-generation", dataset_type=dataset["path"], dataset_name=name,
                    dataset_config=dataset.get("name"), dataset_split=dataset.get("split"), metric_type=metric,
                    metric_value=value, metric_name=what + (f" (standard error {error:.4f})" if error else ""),
                )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; {} for a file that is missing or holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
