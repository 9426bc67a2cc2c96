"""Benchmark items: rows of the Hub or of a file as contexts and continuations.

    rows = read_rows("piqa", data="piqa.jsonl", limit=100)        # data=None: from the Hub
    item = render(rows[0], "piqa")
    item.contexts[0], item.continuations[0]                       # 'Question: …\\nAnswer:', ' replace drawer with …'

Every task is rendered as lm-eval renders it, down to the doubled space that its COPA and WSC273 have, so that figures
compare. HellaSwag has a second style, `completion`: the raw context, a space and the ending, tokenised apart, as in
build-nanogpt's hellaswag.py. A row may have the fields of the Hub's dataset or those of LLM Foundry's files (query,
choices, gold / context_options, continuation, gold / context, continuation).
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

Question = tuple[list[tuple[str, str]], Any]  # the (context, choice) pairs of a row, and its label

# What a query of LLM Foundry's files lacks of lm-eval's prompt; piqa's ends with a line break.
FOUNDRY_ENDS = {"piqa": "Answer:", "arc_easy": "\nAnswer:", "arc_challenge": "\nAnswer:", "boolq": "\nAnswer:"}
POSSESSIVES = "my his her our their".split()
SMALL_INSIDE = "A An The She He It They My His Her Their".split()  # at the beginning of an option, in mid-sentence


@dataclass(frozen=True)
class Row:
    """One line of a file or one row of a Hub dataset, and its place for messages about it."""

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
    lengths: list[int] | None
    apart: bool


def _list(value: list[str]) -> list[str]:
    """The value, unless it is a string, which a loop would take apart into characters."""
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return value


def _question(prompt: str, choices: list[str], label: Any) -> Question:
    """The same prompt before every choice."""
    return [(prompt, choice) for choice in _list(choices)], label


# The renderers join texts with +, because + refuses a value that is no text.


def _piqa(row: dict) -> Question:
    return _question("Question: " + row["goal"] + "\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def _arc(row: dict) -> Question:
    return _lettered("Question: " + row["question"] + "\nAnswer:", row)


def _openbookqa(row: dict) -> Question:
    return _lettered(row["question_stem"], row)


def _lettered(prompt: str, row: dict) -> Question:
    choices, letters = row["choices"]["text"], row["choices"]["label"]
    return _question(prompt, choices, letters.index(row["answerKey"].strip()))


def _copa(row: dict) -> Question:
    # lm-eval begins the choice with a space and puts its own before it.
    connector = [" because", " therefore"][["cause", "effect"].index(row["question"])]
    choices = [" " + choice[:1].lower() + choice[1:] for choice in (row["choice1"], row["choice2"])]
    return _question(row["premise"].strip()[:-1] + connector, choices, row["label"])


def _boolq(row: dict) -> Question:
    prompt = row["passage"] + "\nQuestion: " + row["question"] + "?\nAnswer:"
    return _question(prompt, ["no", "yes"], row["label"])


def _winogrande(row: dict) -> Question:
    """Partial scoring: the contexts differ, the same words after the name are scored (Trinh & Le 2018)."""
    before, after = row["sentence"].split("_", 1)
    pairs = [(before + row[option], after.strip()) for option in ("option1", "option2")]
    return pairs, ["1", "2"].index(row["answer"])


def _wsc273(row: dict) -> Question:
    # lm-eval keeps the space after the pronoun and puts its own before it.
    text, start, pronoun = row["text"].replace("  ", " "), row["pronoun_loc"], row["pronoun"]
    if not 0 <= start < len(text):
        raise ValueError(f"pronoun_loc is {start}, the text has {len(text)} characters")
    pairs = []
    for option in _list(row["options"]):
        option = option + "'s" if pronoun.lower() in POSSESSIVES else option
        first = option.split()[0]
        if text[start - 2] != "." and first in SMALL_INSIDE:
            option = option.replace(first, first.lower())
        pairs.append((text[:start] + option, text[start + len(pronoun) :]))
    return pairs, row["label"]


def _lambada(row: dict) -> Question:
    """One continuation, the last word: right where greedy decoding gives it."""
    context, _, word = row["text"].rpartition(" ")
    return [(context, word)], 0


def _completion(row: dict) -> Question:
    return _question(row["ctx"], row["endings"], row["label"])


def _hellaswag(row: dict) -> Question:
    context = _without_brackets(row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize())
    return _question(context, [_without_brackets(ending) for ending in _list(row["endings"])], row["label"])


def _without_brackets(text: str) -> str:
    """A HellaSwag text without WikiHow's [title], [step] and [substeps], as lm-eval removes them."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _foundry(row: dict, task: str) -> Question:
    """A row with the fields of LLM Foundry's files."""
    space = " " if task in ("copa", "wsc273") else ""  # lm-eval has two of them there
    if "context_options" in row:
        return [(context, space + row["continuation"]) for context in _list(row["context_options"])], row["gold"]
    if "continuation" in row:
        return [(row["context"], row["continuation"])], 0
    prompt = row["query"].removeprefix("Passage: ") + FOUNDRY_ENDS.get(task, "")
    return _question(prompt, [space + choice for choice in _list(row["choices"])], row["gold"])


class Task(NamedTuple):
    """How a row is rendered, and where the Hub has the rows: the arguments of `datasets.load_dataset`."""

    render: Callable[[dict], Question]
    dataset: dict[str, str | None]
    styles: tuple[str, ...] = ("harness",)  # the first is the default


def _hub(path: str, split: str, name: str | None = None) -> dict[str, str | None]:
    return {"path": path, "name": name, "split": split}


# A new benchmark is a function above that turns its row into a question, and a line here.
TASKS = {
    "hellaswag": Task(_hellaswag, _hub("Rowan/hellaswag", "validation"), styles=("completion", "harness")),
    "piqa": Task(_piqa, _hub("baber/piqa", "validation")),
    "arc_easy": Task(_arc, _hub("allenai/ai2_arc", "test", "ARC-Easy")),
    "arc_challenge": Task(_arc, _hub("allenai/ai2_arc", "test", "ARC-Challenge")),
    "openbookqa": Task(_openbookqa, _hub("allenai/openbookqa", "test", "main")),
    "copa": Task(_copa, _hub("aps/super_glue", "validation", "copa")),
    "winogrande": Task(_winogrande, _hub("allenai/winogrande", "validation", "winogrande_xl")),
    "wsc273": Task(_wsc273, _hub("lighteval/winograd_wsc", "test", "wsc273")),
    "boolq": Task(_boolq, _hub("aps/super_glue", "validation", "boolq")),
    "lambada_openai": Task(_lambada, _hub("EleutherAI/lambada_openai", "test", "default")),
}


def task_style(task: str, style: str | None = None) -> str:
    """The style that a task is scored in; ValueError for a task or a style that does not exist."""
    if task not in TASKS:
        raise ValueError(f"no task {task!r}: there are {', '.join(TASKS)}")
    styles = TASKS[task].styles
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
    from datasets import load_dataset  # local files need no such library

    dataset = TASKS[task].dataset
    for index, fields in enumerate(load_dataset(**dataset)):
        yield Row(f"{dataset['path']}, row {index}", fields)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its fields; ValueError for one that stands there twice, of which json takes the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return fields


def _lines(path: str | Path) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            fields, why = None, ""
            try:
                fields = json.loads(line, object_pairs_hook=once)
            except (ValueError, RecursionError) as error:
                why = f" ({error})"
            if not isinstance(fields, dict):
                text = line[:60].decode("utf-8", errors="replace").strip()
                raise ValueError(f"{path}, line {number}: no JSON object, but {text!r}{why}")
            yield Row(f"{path}, line {number}", fields)


def render(row: Row, task: str, style: str | None = None) -> Item:
    """One row as the texts that a model is scored on.

    Raises:
        ValueError: a missing field, a value of another type, an empty choice, a label out of range; with its line.
    """
    try:
        return _item(row, task, task_style(task, style))
    except KeyError as error:
        raise ValueError(f"{row.where}: {task} needs the field {error}, the row has {', '.join(row.fields)}") from None
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"{row.where}: a field of {task} has a value of another type ({error})") from None
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None


def _item(row: Row, task: str, style: str) -> Item:
    if style == "completion":
        pairs, label = _completion(row.fields)
    elif row.fields.keys() & {"query", "continuation"}:
        pairs, label = _foundry(row.fields, task)
    else:
        pairs, label = TASKS[task].render(row.fields)
    if len(pairs) < (1 if task == "lambada_openai" else 2):
        raise ValueError(f"{len(pairs)} choices, expected at least 2")
    for number, (context, choice) in enumerate(pairs):
        (context + choice).encode()  # refuses what is no text, and lone surrogates
        if not choice.strip():
            raise ValueError(f"choice {number} is {choice!r}, expected text to score")
    if not (str(label).isdecimal() and int(label) < len(pairs)):
        raise ValueError(f"the label is {label!r}, expected 0 to {len(pairs) - 1}, one of the choices")
    apart = style == "completion"
    return Item(
        row.where, [context for context, _ in pairs], [f" {choice}" for _, choice in pairs], int(label),
        lengths=None if apart else [len(choice) for _, choice in pairs], apart=apart,
    )
