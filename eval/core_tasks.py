"""CORE's tasks: the published bundle, the few-shot prompts of its rows, and what of their tokens is scored.

    tasks = read_bundle(bundle_folder())                  # downloads the bundle once
    rows = read_rows(tasks[0], limit=100)
    items = encode(tasks[0], rows, range(100), tokenizer, max_length=1024)

The protocol is that of nanochat's core_eval.py, which follows DCLM (arXiv 2406.11794): the same order of the rows, the
same few-shot examples, the same prompts and the same cuts, so that the two give the same verdict on every item.
"""

import csv
import json
import os
import random
import shutil
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import yaml
from filelock import FileLock
from huggingface_hub import constants
from tqdm import tqdm

from .loading import start_token
from .scoring import Sequences, common_length
from .tasks import once

BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # where nanochat downloads it from
# Rows of each task in the published bundle. A figure over fewer rows or tasks is not CORE.
PUBLISHED_ROWS = {
    "hellaswag_zeroshot": 10042, "jeopardy": 2117, "bigbench_qa_wikidata": 20321, "arc_easy": 2376,
    "arc_challenge": 1172, "copa": 100, "commonsense_qa": 1221, "piqa": 1838, "openbook_qa": 500,
    "lambada_openai": 5153, "hellaswag": 10042, "winograd": 273, "winogrande": 1267, "bigbench_dyck_languages": 1000,
    "agi_eval_lsat_ar": 230, "bigbench_cs_algorithms": 1320, "bigbench_operators": 210,
    "bigbench_repeat_copy_logic": 32, "squad": 10570, "coqa": 7983, "boolq": 3270,
    "bigbench_language_identification": 10000,
}  # fmt: skip
FIELDS = {  # the fields of a row, and their types
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}


@dataclass(frozen=True)
class CoreTask:
    """One task of the bundle's core.yaml; `baseline` is the accuracy of guessing, from 0 to below 1."""

    label: str
    kind: str
    path: Path
    shots: int
    delimiter: str
    baseline: float


def bundle_folder() -> Path:
    """The published bundle, downloaded into the cache of the Hub's libraries if it is not there yet.

    Raises:
        OSError: the download fails.
    """
    cache = Path(constants.HF_HOME) / "gpt2repro"
    folder = cache / "eval_bundle"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "eval_bundle.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as aside:
                _download(Path(aside) / "bundle.zip")
                with zipfile.ZipFile(Path(aside) / "bundle.zip") as archive:
                    archive.extractall(aside)  # checks the archive's checksums
                read_bundle(Path(aside) / "eval_bundle")
                os.replace(Path(aside) / "eval_bundle", folder)
    return folder


def _download(path: Path) -> None:
    try:
        with urlopen(BUNDLE, timeout=10) as response, open(path, "wb") as file:
            size = int(response.headers.get("Content-Length", 0)) or None
            with tqdm.wrapattr(response, "read", total=size, desc="CORE's bundle", disable=None) as stream:
                shutil.copyfileobj(stream, file)
    except OSError as error:
        raise OSError(
            f"{BUNDLE} cannot be downloaded ({error}): give --bundle the folder of a bundle that you have"
        ) from None


def read_bundle(folder: str | Path, *, labels: list[str] | None = None) -> list[CoreTask]:
    """The bundle's tasks in its order, or those of `labels`.

    Raises:
        ValueError: no bundle, a task that is damaged in it, or a label that it has not.
    """
    folder = Path(folder)
    try:
        entries = yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        with open(folder / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        tasks = [
            CoreTask(
                label=entry["label"], kind=entry["icl_task_type"], path=folder / "eval_data" / entry["dataset_uri"],
                shots=entry["num_fewshot"][0], delimiter=entry.get("continuation_delimiter", " "),
                baseline=baselines[entry["label"]],
            )
            for entry in entries
        ]
    except (OSError, KeyError, IndexError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{folder} is no bundle of CORE ({type(error).__name__}: {error}): expected core.yaml with icl_tasks, "
            "eval_meta_data.csv with a random baseline for each of them, and eval_data/"
        ) from None
    if unknown := [label for label in labels or () if label not in {task.label for task in tasks}]:
        raise ValueError(f"{folder} has no task {', '.join(unknown)}: it has {', '.join(t.label for t in tasks)}")
    tasks = [task for task in tasks if labels is None or task.label in labels]
    for task in tasks:
        if task.kind not in FIELDS or not 0 <= task.baseline < 1 or not task.path.is_file():
            raise ValueError(
                f"{folder}, {task.label}: a task of type {task.kind} with baseline {task.baseline} and rows in "
                f"{task.path}: expected one of {', '.join(FIELDS)}, a baseline below 100 % and a file that exists"
            )
    return tasks


def read_rows(task: CoreTask, *, limit: int | None = None) -> list[dict[str, Any]]:
    """The task's rows in the order of nanochat, shuffled with Random(1337), and of these the first `limit`.

    Raises:
        ValueError: no rows, fewer than the examples need, or a row that cannot be scored (with its line).
    """
    rows = []
    with open(task.path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(_checked(json.loads(line, object_pairs_hook=once), task))
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{task.path}, line {number}: {error}") from None
    random.Random(1337).shuffle(rows)
    rows = rows[:limit]
    if len(rows) <= task.shots:
        raise ValueError(
            f"{task.label} has {len(rows)} rows: a row and its {task.shots} few-shot examples need at least "
            f"{task.shots + 1}; raise --limit, or leave the task out with --tasks"
        )
    return rows


def _checked(row: Any, task: CoreTask) -> dict[str, Any]:
    """The row, if it has the fields of the task."""
    wanted = FIELDS[task.kind]
    if not isinstance(row, dict) or any(type(row.get(name)) is not kind for name, kind in wanted.items()):
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in wanted.items())
        raise ValueError(f"a row of {task.label} needs the fields {expected}, this one is {str(row)[:80]}")
    for options in (row[name] for name, kind in wanted.items() if kind is list):
        if not options or not all(isinstance(option, str) for option in options):
            raise ValueError(f"the options are {options!r}: expected a list of texts")
        if not 0 <= row["gold"] < len(options):
            raise ValueError(f"gold is {row['gold']}: expected 0 to {len(options) - 1}, one of the options")
    return row


def prompts(task: CoreTask, rows: list[dict[str, Any]], index: int) -> list[str]:
    """The texts of one row, after its few-shot examples: one for each option, or for a language-modeling task the
    text without its continuation and the whole text.

    The examples are drawn with Random(1234 + index) from all other rows.
    """
    drawn = random.Random(1234 + index).sample(range(len(rows) - 1), task.shots)  # places among the other rows
    examples = "".join(_example(task, rows[place + (place >= index)]) + "\n\n" for place in drawn)
    row = rows[index]
    if task.kind == "multiple_choice":
        return [f"{examples}{row['query']}{task.delimiter}{choice}" for choice in row["choices"]]
    if task.kind == "schema":
        return [f"{examples}{option}{task.delimiter}{row['continuation']}" for option in row["context_options"]]
    before = examples + row["context"].strip() + task.delimiter
    return [before.strip(), before + row["continuation"]]


def _example(task: CoreTask, row: dict[str, Any]) -> str:
    """A row with its right answer."""
    if task.kind == "multiple_choice":
        return row["query"] + task.delimiter + row["choices"][row["gold"]]
    if task.kind == "schema":
        return row["context_options"][row["gold"]] + task.delimiter + row["continuation"]
    return row["context"].strip() + task.delimiter + row["continuation"]


def encode(
    task: CoreTask, rows: list[dict[str, Any]], indices: Iterable[int], tokenizer, *, max_length: int
) -> list[Sequences | None]:
    """What is scored of the rows at `indices`; None for a row that cannot be scored and counts as wrong.

    Every text follows the start token, and is cut from the left to `max_length` tokens by itself. Scored are: what
    follows the longest common beginning of the choices (multiple_choice), their longest common end (schema), the
    continuation (language_modeling). A row cannot be scored if the text without its continuation is no beginning of
    the whole text in tokens, or if a scored token is cut off: nanochat's code stops at an assertion there.
    """
    indices, start = list(indices), start_token(tokenizer)
    texts = [prompts(task, rows, index) for index in indices]
    flat = [text for own in texts for text in own]
    ids = iter(tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"] if flat else [])
    tokens = [[[start, *next(ids)] for _ in own] for own in texts]
    return [
        _sequences(task, own, label=rows[index].get("gold", 0), max_length=max_length)
        for index, own in zip(indices, tokens, strict=True)
    ]


def _sequences(task: CoreTask, tokens: list[list[int]], *, label: int, max_length: int) -> Sequences | None:
    """The scored spans of an item's token sequences."""
    if task.kind == "language_modeling":
        before, text = tokens
        starts = [len(before)]
        if text[: len(before)] != before or len(text) == len(before):
            return None
        tokens = [text]
    elif task.kind == "multiple_choice":
        starts = [common_length(tokens)] * len(tokens)
    else:
        shared = common_length([text[::-1] for text in tokens])
        starts = [len(text) - shared for text in tokens]
    cuts = [max(0, len(text) - max_length) for text in tokens]
    # The first token of what is left has nothing before it that could predict it.
    if any(start - cut < 1 for start, cut in zip(starts, cuts, strict=True)):
        return None
    targets = [text[start:] for text, start in zip(tokens, starts, strict=True)]
    inputs = [text[cut:-1] for text, cut in zip(tokens, cuts, strict=True)]
    return Sequences(inputs, targets, [float(len(target)) for target in targets], label, truncated=any(cuts))
