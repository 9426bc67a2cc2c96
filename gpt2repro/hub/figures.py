"""What was measured of a checkpoint: by its run while it trained, and by `python -m eval.…` afterwards."""

import json
import math
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from gpt2repro.files import file_sha256
from gpt2repro.run.checkpoints import AVERAGE

METRICS = ("core", "acc", "acc_norm", "loss", "perplexity", "bits_per_byte")
# The fields that show that a JSON file is one of eval's: of a benchmark, of CORE, of a validation.
RESULTS = ({"model", "task", "acc", "n"}, {"model", "task", "core", "n"}, {"model", "measured_on", "loss", "tokens"})

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


def file_figures(checkpoint: Path) -> Figures:
    """The figures of these weights in JSON files of eval, in the checkpoint's folder or beside it."""
    files = [*sorted(checkpoint.parent.glob("*.json")), *sorted(checkpoint.glob("*.json"))]
    of_eval = [figure for figure in map(read_json, files) if any(fields <= figure.keys() for fields in RESULTS)]
    weights = weights_sha256(checkpoint) if of_eval else None
    figures: Figures = {}
    for figure in of_eval:
        if weights and figure.get("weights_sha256") == weights:
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
                fewer = metric == "core" and not figure["complete"]
                note = f"{len(figure['tasks'])} tasks: not CORE" if fewer else None
                what = ", ".join(filter(None, [metric, style and f"{style} style", count, note])) + when
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


def weights_sha256(folder: str | Path) -> str | None:
    """The sha256 of a folder's weights: of the file, or of the hashes of several files in the order of their names.

    None where the folder holds none by the names that the library gives them.
    """
    kinds = ("model*.safetensors", "pytorch_model*.bin", "adapter_model*")  # not the optimizer's
    files = [file for kind in kinds for file in sorted(Path(folder).glob(kind)) if file.name != AVERAGE]
    hashes = [file_sha256(file) for file in files]
    return hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()).hexdigest() if hashes else None
