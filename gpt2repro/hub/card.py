"""The model card of a checkpoint: what it is, how to load it, how it was trained, what was measured of it.

Everything in it comes from the run's own records (run.json, metrics.jsonl, trainer_state.json) and from the JSON files
that `python -m eval.…` wrote beside the checkpoint. Local paths and command lines stay at home.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from gpt2repro.recipe import DEFINING_FIELDS
from gpt2repro.run.checkpoints import RECORD
from gpt2repro.run.folder import RECORD as RUN_RECORD
from gpt2repro.run.metrics import read_metrics

METRICS = ("acc", "acc_norm", "loss", "perplexity", "bits_per_byte")
# Where the Hub keeps what a task is scored on: dataset, configuration, split.
TASK_DATASETS = {
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "piqa": ("baber/piqa", None, "validation"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "openbookqa": ("allenai/openbookqa", "main", "test"),
    "copa": ("aps/super_glue", "copa", "validation"),
    "boolq": ("aps/super_glue", "boolq", "validation"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "wsc273": ("lighteval/winograd_wsc", "wsc273", "test"),
    "lambada_openai": ("EleutherAI/lambada_openai", "default", "test"),
}
LIMITATIONS = """\
A base model of English text: it continues a text and follows no instructions. Meant for research, teaching and as a
baseline. Nothing was done to make what it writes true, safe or fair: it repeats the errors and prejudices of its
training text, invents facts, and may reproduce passages of that text. Do not let it decide anything about people."""


def model_card(checkpoint: Path, folder: Path, *, repo_id: str) -> ModelCard:
    """The card of `folder`, where the model of `checkpoint` lies as it is to be published (converted, it may be)."""
    config = _read(folder / "config.json")
    state, run, rows = _run_of(checkpoint)
    source = run.get("dataset", {}).get("source") or {}
    hub_dataset = source.get("dataset") if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source.get("dataset"))) else None
    is_stock = config["model_type"] == "gpt2"
    results = list(_results(checkpoint, state, rows, run, hub_dataset))
    data = ModelCardData(
        license="apache-2.0", language="en", library_name="transformers", pipeline_tag="text-generation",
        tags=["gpt2", "gpt2repro"], model_name=repo_id.split("/")[-1], eval_results=results or None,
        datasets=[hub_dataset] if hub_dataset else None,
    )  # fmt: skip
    parameters = sum(_tensor_sizes(folder))
    trust = "" if is_stock else ", trust_remote_code=True"
    kind = "stock `GPT2LMHeadModel`, converted without loss" if is_stock else "its code lies beside the weights"
    parts = [
        f"# {data.model_name}",
        f"A GPT-2 of {parameters:,} parameters, "
        + (f"trained for {state['tokens']:,} tokens" if state else "converted")
        + f" with gpt2repro ({kind}).",
        "## Load it\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{repo_id}"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}"{trust})\n```',
    ]
    if results:
        lines = [[r.dataset_name, r.metric_name, f"{r.metric_value:.4f}"] for r in results]
        parts.append("## Results\n\n" + _table(["on", "measured", "value"], lines))
    if run:
        parts.append("## Training\n\n" + _table(["fact", "value"], _training_facts(state, run, rows, source)))
        recipe = run["recipe"]
        used = [[n, recipe[n]] for n in DEFINING_FIELDS if n != "init_from" and recipe.get(n) is not None]
        parts.append("## Hyperparameters\n\n" + _table(["field", "value"], used))
    if (folder / "curves.png").is_file():
        parts.append("![Loss over tokens](curves.png)")
    parts.append("## Use and limits\n\n" + LIMITATIONS)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _run_of(checkpoint: Path) -> tuple[dict, dict, list[dict]]:
    """The record of a checkpoint, that of the run around it, and its metrics up to there; empty without a run."""
    if not (checkpoint / RECORD).is_file():
        return {}, {}, []
    state, metrics = _read(checkpoint / RECORD), checkpoint.parent / "metrics.jsonl"
    rows = [row for row in read_metrics(metrics) if row["step"] <= state["step"]] if metrics.is_file() else []
    return state, _read(checkpoint.parent / RUN_RECORD), rows


def _training_facts(state: dict, run: dict, rows: list[dict], source: dict) -> list[list[Any]]:
    last, recipe, dataset = run["starts"][-1], run["recipe"], run["dataset"]
    train = [row for row in rows if row["kind"] == "train"]
    speeds = [row["tokens_per_second"] for row in train if row.get("tokens_per_second")]
    named = [source.get(key) for key in ("dataset", "config", "revision")] if source.get("dataset") else []
    facts = {
        "steps": f"{state['step']:,} of {recipe['max_steps']:,}, {recipe['global_batch_tokens']:,} tokens each",
        "tokens": f"{state['tokens']:,}",
        "training text": " ".join(map(str, filter(None, named))) or source.get("name") or _names(dataset["dir"]),
        "tokens in it": f"{dataset['train_tokens']:,}",
        "tokenizer": _public(recipe.get("tokenizer")),
        "started from": _public(recipe.get("init_from")),
        "last training loss": f"{train[-1]['loss']:.4f}" if train and train[-1]["loss"] is not None else "",
        "hardware": f"{last['processes']} x {last['hardware']}",
        "tokens a second": f"{median(speeds):,.0f} (median)" if speeds else "",
        "hours of steps": f"{sum(recipe['global_batch_tokens'] / s for s in speeds) / 3600:,.2f}" if speeds else "",
        "starts": len(run["starts"]),
        "commit": (last["git_commit"] or "") + (" with changes" if last["git_commit"] and last["git_dirty"] else ""),
        "versions": ", ".join(f"{name} {number}" for name, number in last["versions"].items()),
    }  # fmt: skip
    return [[name, value] for name, value in facts.items() if value]


def _results(
    checkpoint: Path, state: dict, rows: list[dict], run: dict, hub_dataset: str | None
) -> Iterator[EvalResult]:
    """What was measured: the last rows of the run's metrics, replaced by evaluations of this very checkpoint.

    Those are the JSON files of `python -m eval.…` in its folder, and in the run's folder where they name it and are
    younger than it, so that a figure of an older `latest` never becomes this one's.
    """
    own = _names(run["dataset"]["dir"]) if run else ""
    figures: dict[tuple[str, str | None], dict] = {}
    for row in rows:
        if row["kind"] == "val":
            figures[own, None] = {**row, "n": row["eval_tokens"]}
        elif row["kind"] == "eval":
            figures[row["task"], row.get("style")] = row
    saved = (checkpoint / (RECORD if state else "config.json")).stat().st_mtime
    for file in sorted([*checkpoint.parent.glob("*.json"), *checkpoint.glob("*.json")]):
        found = _read(file)
        wanted = ("model", "task", "acc", "n") if "task" in found else ("model", "measured_on", "loss", "tokens")
        if not found.keys() >= set(wanted):
            continue  # some other file
        beside = file.parent != checkpoint
        if beside and (Path(found["model"]).resolve() != checkpoint or file.stat().st_mtime < saved):
            continue
        key = (found["task"], found.get("style")) if "task" in found else (_names([found["measured_on"]]), None)
        figures[key] = {"n": found.get("tokens"), **found, "step": state.get("step")}
    for (name, style), row in figures.items():
        elsewhere = (hub_dataset or name, None, "validation") if name == own else (name, None, None)
        hub_id, config, split = TASK_DATASETS.get(name, elsewhere)
        of = f"{row['n']:,} {'tokens' if 'loss' in row else 'items'}"
        when = f" at step {row['step']:,}" if row["step"] != state.get("step") else ""
        for metric in METRICS:
            value = row.get(metric)
            if isinstance(value, float) and math.isfinite(value):
                error = f" (standard error {row[metric + '_stderr']:.4f})" if row.get(metric + "_stderr") else ""
                yield EvalResult(
                    task_type="text-generation", dataset_type=hub_id, dataset_name=name, dataset_config=config,
                    dataset_split=split, metric_type=metric, metric_value=value,
                    metric_name=", ".join(filter(None, [metric, style and f"{style} style", of])) + when + error,
                )  # fmt: skip


def _tensor_sizes(folder: Path) -> Iterator[int]:
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            yield from (math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())


def _names(folders: list[str]) -> str:
    return ", ".join(Path(folder).name for folder in folders)


def _public(name: str | None) -> str:
    """A Hub id, train:N or relative path as it is; of an absolute path the last part."""
    return Path(name).name if name and Path(name).expanduser().is_absolute() else name or ""


def _table(head: list[str], lines: list[list[Any]]) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *lines])


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; {} for a file that is none, such as one that somebody else left beside a checkpoint."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
