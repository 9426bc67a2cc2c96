"""An input that a command refuses leaves every file as it was."""

import hashlib
import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from gpt2repro.command import COMMANDS
from tests.conftest import TINY

ITEM = {"goal": "Throw it.", "sol1": "far", "sol2": "near", "label": 0}
MODEL = ["--model", "run/latest", "--device", "cpu"]
# Of each command, the words that it refuses in the folder of the fixture `work`.
REFUSED = {
    "train": [
        ["--recipe", "recipe.yaml", "--learning_rate", "0,0006"],
        ["--recipe", "recipe.yaml", "--output_dir", "new", "--micro_batch_size", "3"],
        ["--recipe", "recipe.yaml", "--output_dir", "new", "--dataset_dir", "nowhere"],
        ["--recipe", "recipe.yaml", "--output_dir", "new", "--init_from", "./nowhere"],
        ["--recipe", "recipe.yaml", "--output_dir", "new", "--resume", "nowhere"],
        ["--recipe", "recipe.yaml", "--output_dir", "new", "--eval_tasks", "piqa=broken.jsonl"],
        ["--recipe", "recipe.yaml", "--output_dir", "thesis"],
        ["--recipe", "recipe.yaml", "--output_dir", "new", "--init_from", ""],
        ["--recipe", ""],
        ["--recipe", "recipe.yaml", "--output_dir", "run", "--seed", "7"],
        ["--recipe", "recipe.yaml", "--output_dir", "new", "--dataset_dir", "new-data", "--source", "files",
         "--files", "broken.jsonl", "--tokenizer", "train:300"],
    ],
    "prepare": [
        ["--source", "files", "--files", "nowhere/*", "--tokenizer", "data", "--out", "new"],
        ["--source", "files", "--files", "text.txt", "--tokenizer", "data", "--out", "thesis"],
        ["--source", "files", "--files", "text.txt", "--tokenizer", "data", "--out", "data"],
        ["--source", "files", "--files", "text.txt", "--tokenizer", "data", "--out", "text.txt"],
        ["--source", "files", "--files", "piqa.jsonl", "--tokenizer", "data", "--out", "new"],
        ["--source", "files", "--files", "piqa.jsonl", "--tokenizer", "train:300", "--out", "new"],
        ["--source", "files", "--files", "text.txt", "--tokenizer", "train:9", "--out", "new"],
        ["--source", "files", "--files", "text.txt", "--tokenizer", "data", "--text-field", "", "--out", "new"],
        ["--source", "files", "--files", "text.txt", "--tokenizer", "data", "--val-tokens", "999999", "--out", "new"],
    ],
    "eval validation": [
        [*MODEL, "--text", "text.txt", "--output", "text.txt"],
        [*MODEL, "--text", "piqa.jsonl", "--output", "piqa.jsonl"],
        [*MODEL, "--text", "nowhere.txt", "--output", "new.json"],
        [*MODEL, "--text", "text.txt", "--seq-len", "9999", "--output", "new.json"],
        [*MODEL, "--dataset", "thesis", "--output", "new.json"],
        [*MODEL, "--text", "text.txt", "--output", ""],
        [*MODEL, "--text", "text.txt", "--tokenizer", "", "--output", "new.json"],
    ],
    "eval multiple-choice": [
        [*MODEL, "--task", "piqa", "--data", "piqa.jsonl", "--output", "piqa.json"],
        [*MODEL, "--task", "piqa", "--data", "piqa.jsonl", "--output", "recipe.yaml"],
        [*MODEL, "--task", "piqa", "--data", "broken.jsonl", "--output", "new.json"],
        [*MODEL, "--task", "piqa", "--data", "piqa.jsonl", "--limit", "0", "--output", "new.json"],
    ],
    "eval hellaswag": [
        [*MODEL, "--data", "piqa.jsonl", "--output", "new.json"],
        [*MODEL, "--data", "piqa.jsonl", "--output", "thesis/chapter1.tex"],
    ],
    "eval core": [
        [*MODEL, "--bundle", "thesis", "--output", "new.json"],
        [*MODEL, "--bundle", "thesis", "--output", "text.txt"],
        [*MODEL, "--bundle", "", "--output", "new.json"],
        [*MODEL, "--tasks", "", "--output", "new.json"],
    ],
    "eval lm-harness": [
        [*MODEL, "--tasks", "piqa", "--output", "text.txt"],
        [*MODEL, "--tasks", "piqa", "--output", ""],
    ],
    "sample": [[*MODEL, "--prompt", "a", "--num-samples", "0"], ["--model", "./nowhere", "--prompt", "a"]],
    "convert": [
        ["./nowhere", "new", "--to", "gpt2"],
        ["run/latest", "thesis", "--to", "gpt2"],
        ["run/latest", "text.txt", "--to", "gpt2"],
        ["run/latest", "new", "--to", "gpt2", "--tokenizer", "./nowhere"],
        ["data", "new", "--to", "gpt2repro"],
        ["run/latest", "new", "--to", "gpt2", "--tokenizer", ""],
    ],
    "gguf": [["run/latest", "text.txt"], ["./nowhere", "new.gguf"], ["data", "new.gguf"]],
    "publish": [
        ["run/latest", "--repo-id", "me/model", "--dry-run", "thesis"],
        ["run/latest", "--repo-id", "../model", "--dry-run", "new"],
        ["data", "--repo-id", "me/model", "--dry-run", "new"],
        ["./nowhere", "--repo-id", "me/model", "--dry-run", "new"],
        ["run/latest", "--repo-id", "me/model", "--dry-run", "new", "--license", ""],
    ],
    "doctor": [["nowhere.yaml"], ["broken.yaml"]],
    "scaling": [["nowhere.yaml"], ["recipe.yaml", "--micro_batch_size", "3"], ["recipe.yaml", "--gpus", "0"]],
    "report": [["nowhere"], ["thesis"], ["run", "--output", "text.txt"], ["run", "--html", "piqa.jsonl"]],
    "sweep": [
        ["recipe.yaml", "--set", "beta1=2", "--output", "new"],
        ["recipe.yaml", "--set", "beta1", "--output", "new"],
        ["recipe.yaml", "--set", "micro_batch_size=3", "--output", "new"],
        ["recipe.yaml", "--set", "seed=1", "--output", "new", "--seeds", "0"],
        ["broken.yaml", "--set", "seed=1", "--output", "new"],
    ],
    "inspect": [
        ["nowhere/at/all"],
        ["thesis"],
        ["data", "--output", "text.txt"],
        ["run/latest", "--output", "piqa.jsonl"],
    ],
    "app": [["./nowhere"], ["thesis"]],
    "verify": [["--model", "./nowhere"], ["--data", "nowhere.jsonl", "--model", "run/latest"]],
}  # fmt: skip


@pytest.fixture
def work(unbroken_run, tiny_dataset, tmp_path, monkeypatch) -> Path:
    """A folder with a run, a dataset, items, a text, recipes and somebody's thesis; it is the current one."""
    shutil.copytree(unbroken_run, tmp_path / "run", symlinks=True)
    shutil.copytree(tiny_dataset, tmp_path / "data")
    (tmp_path / "piqa.jsonl").write_text(json.dumps(ITEM) + "\n" + json.dumps(ITEM) + "\n")
    (tmp_path / "broken.jsonl").write_text(json.dumps(ITEM) + "\n" + json.dumps({**ITEM, "label": 7}) + "\n")
    (tmp_path / "text.txt").write_text("The man throws the ball. " * 40)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("mine")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**TINY, "dataset_dir": "data"}))
    (tmp_path / "broken.yaml").write_text("learning_rate: [")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder: Path) -> dict[str, tuple]:
    """Every file, link and folder, with its content and the time of its last change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else "" if path.is_dir() else path.read_bytes()
        digest = hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()
        found[str(path.relative_to(folder))] = (digest, path.lstat().st_mtime_ns)
    return found


def test_every_command_has_refused_inputs():
    assert REFUSED.keys() == COMMANDS.keys()


CASES = [(name, words) for name in REFUSED for words in REFUSED[name]]


@pytest.mark.parametrize(("name", "words"), CASES, ids=[f"{name} {' '.join(words)}"[:110] for name, words in CASES])
def test_a_refused_input_changes_no_file(work, capfd, name, words):
    before = tree(work)
    try:
        code = importlib.import_module(COMMANDS[name]).main(words)
    except SystemExit as wrong_usage:
        code = wrong_usage.code
    printed = capfd.readouterr().err
    assert code in (1, 2), printed
    assert "error: " in printed and "Traceback" not in printed
    assert tree(work) == before
