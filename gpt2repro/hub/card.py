"""The model card of a checkpoint: how to load it, what was measured of it, how it was trained, its license.

All of it comes from the run's own records and from the JSON files that `python -m eval.…` wrote. Command lines and
absolute paths are left out. The text is model_card_template.md.
"""

import math
import re
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from gpt2repro.hub.figures import eval_results, file_figures, read_json, run_figures
from gpt2repro.recipe import DEFINING_FIELDS
from gpt2repro.run.checkpoints import RECORD
from gpt2repro.run.folder import CURVES, RunFolder

TEMPLATE = Path(__file__).with_name("model_card_template.md")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
OPENAI_MODELS = {f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


def model_card(checkpoint: Path, folder: Path, *, repo_id: str, **terms: str | None) -> ModelCard:
    """The card of `folder`, which holds the model of `checkpoint` as it is to be published (perhaps converted).

    `terms` are a license and a language that replace what is known of the weights.
    """
    state, run_folder = read_json(checkpoint / RECORD), RunFolder(checkpoint.parent)
    run: dict[str, Any] = (run_folder.record() if state else None) or {}
    recipe, dataset = run.get("recipe", {}), run.get("dataset", {"dir": []})
    rows = run_folder.rows(up_to=state["step"]) if run else []
    text, source = ", ".join(Path(path).name for path in dataset["dir"]), dataset.get("source") or {}
    hub_datasets = [source["dataset"]] if HUB_ID.fullmatch(str(source.get("dataset"))) else []

    figures = run_figures(rows, dataset=text) | file_figures(checkpoint)
    on_hub = {text: {"path": (hub_datasets or [text])[0], "split": "validation"}}
    results = list(eval_results(figures, step=state.get("step"), on_hub=on_hub))
    data = ModelCardData(
        model_name=repo_id.split("/")[-1], library_name="transformers", pipeline_tag="text-generation",
        tags=["gpt2", "gpt2repro"], datasets=hub_datasets or None, eval_results=results or None,
        **{"language": "en"} | terms_of(checkpoint) | {name: term for name, term in terms.items() if term},
    )
    return ModelCard.from_template(
        data, template_path=str(TEMPLATE), name=data.model_name, repo_id=repo_id, parameters=_parameters(folder),
        stock=read_json(folder / "config.json")["model_type"] == "gpt2", state=state, run=run, results=results,
        facts=_training_facts(state, run, rows, text) if run else [],
        hyperparameters=[(name, recipe.get(name)) for name in DEFINING_FIELDS if name != "init_from"],  # may be a path
        picture=CURVES if (folder / CURVES).is_file() else None,
    )


def terms_of(source: str | Path | None) -> dict[str, Any]:
    """License, language and base model of the weights in a folder or Hub id, where known; None is a random start."""
    if source is None:
        return {"license": "apache-2.0"}
    folder = Path(source).resolve()
    if not folder.exists() and HUB_ID.fullmatch(str(source)):
        return {"base_model": source} | ({"license": "mit"} if source in OPENAI_MODELS else {})
    if (folder / RECORD).is_file() and (run := RunFolder(folder.parent).record()):
        return terms_of(run["recipe"].get("init_from"))
    readme = folder / "README.md"
    try:
        metadata = ModelCard.load(readme).data.to_dict() if readme.is_file() else {}
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the head of {readme} is no YAML ({reason}): mend or delete it") from None
    return {name: metadata[name] for name in ("license", "language", "base_model") if name in metadata}


def _training_facts(state: dict, run: dict, rows: list[dict], text: str) -> list[tuple[str, Any]]:
    last, recipe, source = run["starts"][-1], run["recipe"], run["dataset"].get("source") or {}
    hub_source = [source[key] for key in ("dataset", "config", "revision") if source.get(key)]
    steps = [row for row in rows if row["kind"] == "train"]
    loss = steps[-1].get("loss") if steps else None
    speeds = [row["tokens_per_second"] for row in steps if row.get("tokens_per_second")]
    return [
        ("steps", f"{state['step']:,} of {recipe['max_steps']:,}, {recipe['global_batch_tokens']:,} tokens each"),
        ("tokens", f"{state['tokens']:,}"),
        ("training text", " ".join(hub_source) or source.get("name") or text),
        ("tokens in it", f"{run['dataset']['train_tokens']:,}"),
        ("tokenizer", _without_folder(recipe.get("tokenizer"))),
        ("started from", _without_folder(recipe.get("init_from"))),
        ("last training loss", f"{loss:.4f}" if loss else None),
        ("hardware", f"{last['processes']} x {last['hardware']}"),
        ("tokens a second", f"{median(speeds):,.0f} (median)" if speeds else None),
        ("commit", (last["git_commit"] or "") + (" with changes" if last["git_dirty"] else "")),
        ("versions", ", ".join(f"{name} {number}" for name, number in last["versions"].items())),
    ]


def _parameters(folder: Path) -> int:
    count = 0
    for file in {*folder.glob("model*.safetensors")} - {*folder.glob("model.ema.safetensors")}:
        with safe_open(file, framework="pt") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    return count


def _without_folder(name: str | None) -> str | None:
    """A Hub id, train:N or relative path as it is; of an absolute path the last part."""
    return Path(name).name if name and Path(name).expanduser().is_absolute() else name
