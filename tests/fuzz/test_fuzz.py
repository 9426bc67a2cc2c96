"""Hostile inputs, drawn at random from a fixed seed: the right value or an explained error, never a traceback.

FUZZ=20 in the environment draws twenty times as many.
"""

import contextlib
import copy
import importlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval.loading import load_model
from eval.scoring import encode
from eval.tasks import TASKS, read_rows, render
from gpt2repro.command import UsageError
from gpt2repro.data.shards import open_dataset
from gpt2repro.data.sources import open_source
from gpt2repro.recipe import Recipe
from gpt2repro.recipe_parser import parse_recipe, write_recipe
from gpt2repro.run.checkpoints import verify_checkpoint
from gpt2repro.run.folder import RunFolder
from gpt2repro.run.metrics import read_metrics

FUZZ = int(os.environ.get("FUZZ", "1"))


def fuzz(examples: int) -> Callable:
    """Settings of a test: so many inputs, the same ones every time, on a machine of any speed."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=examples * FUZZ, deadline=None, derandomize=True, database=None, suppress_health_check=checks
    )


NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 2**63, 2**64, 10**400, 1e308])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = st.sampled_from([*Recipe.__dataclass_fields__])
WORDS = st.one_of(
    st.text(max_size=15), NUMBERS.map(str),
    st.sampled_from(["", "null", "~", "no", "0,0006", "524,288", "1e9", "١٢", "0x10", "1_000", "nan", "-inf", "--seed",
                     "train:", "a=b", "../x", "\x00", "\ud800", "*", "[", "{}", "-1", "1e-400", "a" * 300]),
)  # fmt: skip


def mutate(data: st.DataObject, value: Any) -> Any:
    """A JSON value in which one thing, anywhere, is replaced or removed."""
    whole = [copy.deepcopy(value)]
    containers, places = [whole], []
    for container in containers:
        for key in container if isinstance(container, dict) else range(len(container)):
            places.append((container, key))
            if isinstance(container[key], dict | list):
                containers.append(container[key])
    container, key = data.draw(st.sampled_from(places))
    if data.draw(st.booleans()):
        container[key] = data.draw(VALUES)
    else:
        del container[key]
    return whole[0] if whole else None


def damage(data: st.DataObject, content: bytes, *, within: int | None = None) -> bytes:
    """A file's content with a few of its bytes changed, cut off, or doubled."""
    damaged, end = bytearray(content), within or len(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end - 1))
        match data.draw(st.sampled_from(["flip", "set", "cut", "insert"])):
            case "flip":
                damaged[at % len(damaged)] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                damaged[at % len(damaged)] = data.draw(st.integers(0, 255))
            case "cut":
                del damaged[at : at + data.draw(st.integers(1, 40))]
            case "insert":
                damaged[at:at] = data.draw(st.binary(min_size=1, max_size=10))
        if not damaged:
            break
    return bytes(damaged)


# ---- recipes and flags -----------------------------------------------------------------------------------------


def check_recipe(recipe: Recipe, folder: Path) -> None:
    """What was accepted is what is written and read again; its own check raises nothing but ValueError."""
    with contextlib.suppress(ValueError):
        recipe.check(world_size=2)
    try:
        write_recipe(recipe, folder / "written.yaml")
    except UnicodeEncodeError:
        return  # half a surrogate pair, which no file can hold
    written = parse_recipe(["--recipe", str(folder / "written.yaml")], default="none")
    assert written == replace(recipe, resume="auto")


@fuzz(300)
@given(st.dictionaries(FIELDS | st.text(max_size=8), VALUES | WORDS, max_size=4))
def test_a_recipe_is_read_as_it_says_or_refused(tmp_path, content):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content), "utf-8", errors="surrogatepass")
    with contextlib.suppress(UsageError):
        check_recipe(parse_recipe(["--recipe", str(tmp_path / "recipe.yaml")], default="none"), tmp_path)


@fuzz(200)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_recipe_or_refused(tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with contextlib.suppress(UsageError):
        check_recipe(parse_recipe(["--recipe", str(tmp_path / "recipe.yaml")], default="none"), tmp_path)


@fuzz(300)
@given(st.lists(st.tuples(FIELDS, st.lists(WORDS, max_size=3)), max_size=3))
def test_flags_are_read_as_they_say_or_refused(tmp_path, flags):
    words = [word for name, values in flags for word in (f"--{name}", *values)]
    try:
        recipe = parse_recipe(words, default="none")
    except UsageError:
        return
    except SystemExit as wrong_usage:
        assert wrong_usage.code == 2
        return
    for name, values in flags:
        value = getattr(recipe, name)
        if type(value) is int and len(values) == 1 and [other for other, _ in flags].count(name) == 1:
            assert value == Decimal(values[0].replace(",", ""))
    check_recipe(recipe, tmp_path)


MODEL = ["--model", "model", "--device", "cpu"]
COMMANDS = {  # each with the flags that take a number or a name
    "eval.validation": ([*MODEL, "--text", "text.txt"], ["--seq-len", "--stride", "--batch-size", "--output"]),
    "eval.multiple_choice": ([*MODEL, "--task", "piqa", "--data", "piqa.jsonl"], ["--limit", "--batch-size"]),
    "eval.sample": ([*MODEL, "--prompt", "The", "--num-samples", "1"],
                    ["--max-new-tokens", "--top-k", "--temperature", "--seed", "--prompt"]),
    "gpt2repro.data.prepare": (["--source", "files", "--files", "text.txt", "--tokenizer", "model", "--out", "data"],
                               ["--val-tokens", "--val-fraction", "--workers", "--shard-tokens", "--part", "--out"]),
    "gpt2repro.hub.convert": (["model", "out", "--to", "gpt2"], ["--tokenizer", "--to"]),
    "gpt2repro.hub.publish": (["model", "--repo-id", "me/model", "--dry-run", "out"], ["--repo-id", "--dry-run"]),
    "gpt2repro.tools.inspect": ([], ["model", "--format", "--tokenizer"]),
    "gpt2repro.tools.report": ([], ["--html", "--output", "--compare"]),
    "gpt2repro.tools.sweep": (["recipe.yaml", "--output", "out"], ["--set", "--seeds", "--jobs"]),
}  # fmt: skip
HOSTILE = st.sampled_from(
    ["", "0", "-1", "nan", "inf", "1e3", "9" * 20, "9" * 5000, "x", "a=b", "../x/y", "\x00", "a" * 300]
)


@pytest.fixture
def workplace(checkpoint, tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(checkpoint, folder / "model")
    (folder / "text.txt").write_text("The man throws the ball. " * 20)
    (folder / "piqa.jsonl").write_text(json.dumps(ROWS["piqa"]) + "\n")
    (folder / "recipe.yaml").write_text("model: [")
    monkeypatch.chdir(folder)
    return folder


@fuzz(80)
@given(st.sampled_from([*COMMANDS]), HOSTILE, st.data())
def test_a_commands_words_are_taken_or_refused(workplace, capsys, command, value, data):
    words, flags = COMMANDS[command]
    for folder in "data", "out":
        shutil.rmtree(workplace / folder, ignore_errors=True)
    try:
        code = importlib.import_module(command).main([*words, data.draw(st.sampled_from(flags)), value])
    except SystemExit as wrong_usage:
        code = wrong_usage.code
    printed = capsys.readouterr()
    assert code in (0, 1, 2)
    assert code == 0 or "error: " in printed.err
    assert not (code == 0 and command == "eval.validation" and value in ("0", "-1"))


# ---- documents and benchmark items -----------------------------------------------------------------------------

ROWS = {
    "hellaswag": {"activity_label": "Ball", "ctx_a": "He", "ctx_b": "she", "ctx": "He she", "label": 1,
                  "endings": ["a", "b", "c", "d"]},
    "piqa": {"goal": "Throw it.", "sol1": "far", "sol2": "near", "label": 0},
    "arc_easy": {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "openbookqa": {"question_stem": "Which", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "copa": {"premise": "It fell.", "choice1": "A", "choice2": "B", "question": "cause", "label": 1},
    "boolq": {"passage": "P", "question": "is it", "label": 1},
    "winogrande": {"sentence": "The man saw _ there", "option1": "a", "option2": "b", "answer": "2"},
    "wsc273": {"text": "The man saw it there.", "pronoun": "it", "pronoun_loc": 12, "options": ["a b", "b"],
               "label": 0},
    "lambada_openai": {"text": "The man throws the ball"},
}  # fmt: skip
FOUNDRY = [
    {"query": "Q", "choices": ["a", "b"], "gold": 1}, {"context": "The man", "continuation": "throws"},
    {"context_options": ["a", "b"], "continuation": "throws it", "gold": 1},
]  # fmt: skip


@fuzz(400)
@given(st.sampled_from([*ROWS]), st.none() | st.sampled_from(FOUNDRY), st.data())
def test_an_item_is_whole_or_refused_with_its_line(bpe, tmp_path, task, foundry, data):
    line = json.dumps(mutate(data, foundry or ROWS[task]))
    if data.draw(st.integers(0, 4)) == 0:
        line = damage(data, line.encode()).decode("utf-8", "replace")
    (tmp_path / "items.jsonl").write_text(f"{line}\n", "utf-8")
    try:
        rows = read_rows(task, data=tmp_path / "items.jsonl")
        items = [render(row, task) for row in rows]
        sequences = encode(items, bpe, max_length=64)
    except ValueError as error:
        assert "items.jsonl" in str(error)
        return
    for item, own in zip(items, sequences, strict=True):
        assert 0 <= item.label < len(item.continuations) == len(own.targets)
        assert all(isinstance(text, str) and text.strip() for text in item.continuations)
        assert all(own.targets) and all(length > 0 for length in own.lengths)


def test_the_rows_that_are_damaged_are_those_of_every_task():
    assert {*TASKS} - {*ROWS} == {"arc_challenge"}  # which is rendered as arc_easy


@fuzz(200)
@given(st.lists(st.one_of(
    st.binary(max_size=40), VALUES.map(lambda value: json.dumps({"text": value}).encode()),
    VALUES.map(lambda value: json.dumps(value).encode()),
), max_size=5))  # fmt: skip
def test_a_document_is_the_text_of_its_line_or_left_out(tmp_path, lines):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "first"}\n' + b"\n".join(lines))
    documents = list(open_source("files", files=[str(tmp_path / "a.jsonl")]).documents())
    content = (tmp_path / "a.jsonl").read_bytes().split(b"\n")
    for document in documents:
        if not document.skipped and document.text:
            line = content[int(document.where.rsplit(" ", 1)[1]) - 1]
            assert bytes(document.text).decode() == json.loads(line.decode())["text"]


# ---- records and weights ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset_copy(tiny_dataset, tmp_path_factory) -> Path:
    return shutil.copytree(tiny_dataset, tmp_path_factory.mktemp("fuzz") / "dataset")


@pytest.fixture(scope="module")
def run_copy(unbroken_run, tmp_path_factory) -> Path:
    return shutil.copytree(unbroken_run, tmp_path_factory.mktemp("fuzz") / "run", symlinks=True)


@contextlib.contextmanager
def damaged(data: st.DataObject, file: Path, *, within: int | None = None):
    """The file, damaged or with another JSON value in it, until the end of the block."""
    content = file.read_bytes()
    is_json = within is None and data.draw(st.booleans())
    new = json.dumps(mutate(data, json.loads(content))).encode() if is_json else damage(data, content, within=within)
    try:
        file.write_bytes(new)
        yield
    finally:
        file.write_bytes(content)


@fuzz(200)
@given(st.data())
def test_a_dataset_is_opened_as_it_was_made_or_refused(tiny_dataset, dataset_copy, data):
    with damaged(data, dataset_copy / "dataset.json"):
        try:
            found = open_dataset(dataset_copy)
        except ValueError:
            return
        expected = open_dataset(tiny_dataset)
        assert found.info == expected.info
        assert [found.vocab_size, found.eot_id] == [expected.vocab_size, expected.eot_id]


@fuzz(200)
@given(st.data())
def test_a_checkpoints_record_is_read_as_it_was_written_or_refused(unbroken_run, run_copy, data):
    expected = verify_checkpoint(unbroken_run / "latest")
    with damaged(data, run_copy / "latest" / "trainer_state.json"):
        try:
            assert verify_checkpoint(run_copy / "latest") == expected
        except ValueError as error:
            assert "trainer_state.json" in str(error)


@fuzz(200)
@given(st.data())
def test_a_runs_record_and_metrics_are_read_or_refused(unbroken_run, run_copy, data):
    recipe = parse_recipe(["--recipe", str(unbroken_run / "recipe.yaml")], default="none")
    record = RunFolder(unbroken_run).record()
    facts = {"dataset": record["dataset"], "model": record["model"]}
    with damaged(data, run_copy / "run.json"), contextlib.suppress(ValueError):
        RunFolder(run_copy).check(recipe, **facts)
    with damaged(data, run_copy / "metrics.jsonl", within=400):
        assert all(isinstance(row["step"], int) and isinstance(row["kind"], str)
                   for row in read_metrics(run_copy / "metrics.jsonl"))  # fmt: skip


@fuzz(60)
@given(st.data())
def test_weights_are_loaded_as_they_were_saved_or_refused(checkpoint, tiny_model, tmp_path_factory, data):
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("weights") / "model")
    file = folder / "model.safetensors"
    header = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
    with damaged(data, file, within=header):
        try:
            model, _ = load_model(str(folder), device="cpu")
        except ValueError:
            return
        for (name, found), expected in zip(model.named_parameters(), tiny_model.parameters(), strict=True):
            assert torch.equal(found, expected), name
