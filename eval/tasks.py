"""Benchmark items: rows from the Hub or from a file -> contexts and continuations, as the field renders them.

    rows = read_rows("piqa", data="piqa.jsonl", limit=100)        # data=None: from the Hub
    item = render(rows[0], "piqa")
    item.contexts[0], item.continuations[0]                       # 'Question: …\\nAnswer:', ' replace drawer with …'

Every task is rendered as lm-eval renders it, down to the doubled space that its COPA and WSC273 have, because a figure
is worth something only beside the figures of others. HellaSwag has a second style, `completion`: the raw context, a
space and the ending, tokenised apart, as in build-nanogpt's hellaswag.py. A row may have the fields of the Hub's
dataset or those of LLM Foundry's files (query, choices, gold / context_options, continuation, gold).
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

STYLES = {"hellaswag": ("completion", "harness")}  # the first is the default; every other task has `harness` alone
# What a query of LLM Foundry's files lacks of lm-eval's prompt; piqa's ends with a line break.
FOUNDRY_ENDS = {"piqa": "Answer:", "arc_easy": "\nAnswer:", "arc_challenge": "\nAnswer:", "boolq": "\nAnswer:"}
POSSESSIVES = "my his her our their".split()
SMALL_INSIDE = "A An The She He It They My His Her Their".split()  # at the beginning of an option, in mid-sentence


@dataclass(frozen=True)
class Row:
    """One line of a file, or one row of a Hub dataset, and where it stands for messages about it."""

    where: str
    fields: dict


@dataclass(frozen=True)
class Item:
    """The choices of one question as (context, continuation) pairs, and which of them is right.

    `lengths` are what `acc_norm` divides by, None for the number of tokens. Contexts and continuations are tokenised
    `apart`, or together and then cut where the context's tokens end.
    """

    where: str
    contexts: list[str]
    continuations: list[str]
    label: int
    lengths: list[int] | None = None
    apart: bool = False


@dataclass(frozen=True)
class Task:
    """Where the Hub keeps a task's rows, and how one becomes (contexts, choices, label)."""

    hub: tuple[str, str | None, str]  # dataset, configuration, split
    render: Callable[[dict], tuple[list[str], list[str], int]]


def _question(prompt: str, choices: list[str], label: int) -> tuple[list[str], list[str], int]:
    return [prompt] * len(choices), list(choices), label


def _piqa(row: dict):
    return _question(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def _arc(row: dict):
    return _question(f"Question: {row['question']}\nAnswer:", *_lettered(row))


def _openbookqa(row: dict):
    return _question(row["question_stem"], *_lettered(row))


def _lettered(row: dict) -> tuple[list[str], int]:
    letters = row["choices"]["label"]
    letter = row["answerKey"].strip()
    return row["choices"]["text"], letters.index(letter) if letter in letters else -1


def _copa(row: dict):
    # lm-eval begins the choice with a space and puts its own before it.
    connector = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [f" {choice[0].lower()}{choice[1:]}" for choice in (row["choice1"], row["choice2"])]
    return _question(f"{row['premise'].strip()[:-1]} {connector}", choices, row["label"])


def _boolq(row: dict):
    return _question(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], row["label"])


def _winogrande(row: dict):
    """Partial scoring: the contexts differ, the same words after the name are scored (Trinh & Le 2018)."""
    before, after = row["sentence"].split("_", 1)
    label = {"1": 0, "2": 1}.get(row["answer"], -1)
    return [before + row["option1"], before + row["option2"]], [after.strip()] * 2, label


def _wsc273(row: dict):
    # lm-eval keeps the space after the pronoun and puts its own before it.
    text = row["text"].replace("  ", " ")
    start, pronoun = row["pronoun_loc"], row["pronoun"]
    options = []
    for option in row["options"]:
        option = f"{option}'s" if pronoun.lower() in POSSESSIVES else option
        first = option.split()[0]
        if text[start - 2] != "." and first in SMALL_INSIDE:
            option = option.replace(first, first.lower())
        options.append(text[:start] + option)
    return options, [text[start + len(pronoun) :]] * len(options), row["label"]


def _lambada(row: dict):
    """One continuation, the last word: right where the model would have written it greedily."""
    context, _, word = row["text"].rpartition(" ")
    return [context], [word], 0


def _hellaswag(row: dict):
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _question(_without_brackets(context), [_without_brackets(end) for end in row["endings"]], row["label"])


def _without_brackets(text: str) -> str:
    """WikiHow's [title], [step] and [substeps] out of a HellaSwag text, as lm-eval takes them out."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


TASKS = {
    "hellaswag": Task(("Rowan/hellaswag", None, "validation"), _hellaswag),
    "piqa": Task(("baber/piqa", None, "validation"), _piqa),
    "arc_easy": Task(("allenai/ai2_arc", "ARC-Easy", "test"), _arc),
    "arc_challenge": Task(("allenai/ai2_arc", "ARC-Challenge", "test"), _arc),
    "openbookqa": Task(("allenai/openbookqa", "main", "test"), _openbookqa),
    "copa": Task(("aps/super_glue", "copa", "validation"), _copa),
    "winogrande": Task(("allenai/winogrande", "winogrande_xl", "validation"), _winogrande),
    "wsc273": Task(("lighteval/winograd_wsc", "wsc273", "test"), _wsc273),
    "boolq": Task(("aps/super_glue", "boolq", "validation"), _boolq),
    "lambada_openai": Task(("EleutherAI/lambada_openai", "default", "test"), _lambada),
}


def _foundry(row: dict, task: str):
    """What the renderers above return, from the fields of LLM Foundry's files."""
    space = " " if task in ("copa", "wsc273") else ""  # lm-eval has two of them there
    if "context_options" in row:
        return row["context_options"], [space + row["continuation"]] * len(row["context_options"]), row["gold"]
    if "continuation" in row:
        return [row["context"]], [row["continuation"]], 0
    prompt = row["query"].removeprefix("Passage: ") + FOUNDRY_ENDS.get(task, "")
    return _question(prompt, [space + choice for choice in row["choices"]], row["gold"])


def task_style(task: str, style: str | None = None) -> str:
    """The style that a task is scored in; ValueError for a task or a style that does not exist."""
    if task not in TASKS:
        raise ValueError(f"no task {task!r}: there are {', '.join(TASKS)}")
    styles = STYLES.get(task, ("harness",))
    if style not in (None, *styles):
        raise ValueError(f"{task} has no style {style!r}: it has {' and '.join(styles)}")
    return style or styles[0]


def read_rows(task: str, *, data: str | Path | None = None, limit: int | None = None) -> list[Row]:
    """The first `limit` rows of a task, from a JSONL file or from the Hub.

    Raises:
        ValueError: an empty file, or a line that is no JSON object (with its number).
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: give at least 1, or nothing for all rows")
    rows = list(islice(_lines(data) if data is not None else _hub_rows(task), limit))
    if not rows:
        raise ValueError(f"{data} is empty: give a JSONL file of {task} with one item a line")
    return rows


def _hub_rows(task: str) -> Iterator[Row]:
    from datasets import load_dataset  # a download: only who asks for it needs the library

    path, name, split = TASKS[task].hub
    for index, fields in enumerate(load_dataset(path, name, split=split)):
        yield Row(f"{path}, row {index}", fields)


def _lines(path: str | Path) -> Iterator[Row]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except json.JSONDecodeError:
                fields = None
            if not isinstance(fields, dict):
                raise ValueError(f"{path}, line {number}: no JSON object, but {line[:60].strip()!r}")
            yield Row(f"{path}, line {number}", fields)


def render(row: Row, task: str, style: str | None = None) -> Item:
    """One row as the texts that a model is scored on.

    Raises:
        ValueError: a missing field, an empty ending, a label out of range; with the line of the file.
    """
    style = task_style(task, style)
    try:
        if style == "completion":
            contexts, choices, label = _question(row.fields["ctx"], row.fields["endings"], row.fields["label"])
        elif row.fields.keys() & {"query", "continuation"}:
            contexts, choices, label = _foundry(row.fields, task)
        else:
            contexts, choices, label = TASKS[task].render(row.fields)
        label = int(label)
    except KeyError as error:
        has = ", ".join(row.fields)
        raise ValueError(f"{row.where}: {task} needs the field {error}, the row has {has}") from None
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{row.where}: a field of {task} has a value of another form ({error})") from None
    if len(choices) < (1 if task == "lambada_openai" else 2):
        raise ValueError(f"{row.where}: {len(choices)} choices, expected at least 2")
    for number, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise ValueError(f"{row.where}: choice {number} is {choice!r}, expected text to score")
    if not 0 <= label < len(choices):
        raise ValueError(f"{row.where}: the label is {label}, expected 0 to {len(choices) - 1}, one of the choices")
    lengths = None if style == "completion" else [len(choice) for choice in choices]
    continuations = [f" {choice}" for choice in choices]
    return Item(row.where, contexts, continuations, label, lengths, apart=style == "completion")
