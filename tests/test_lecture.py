"""docs/lecture does what it prints, and the documents name only what there is.

    python -m tests.test_lecture          # runs every cell and writes its output into the pages
"""

import ast
import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import pairwise, takewhile
from pathlib import Path

import pytest
import yaml

from gpt2repro.recipe_parser import DEFAULT_RECIPE, parse_recipe
from tests.conftest import ENVIRONMENT, ROOT

PAGES = sorted((ROOT / "docs" / "lecture").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *PAGES]
CELL = re.compile(r"(?:<!-- numbers within ([\d.]+) % -->\n)?```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
RUNNER = """
import contextlib, io, json, sys
namespace, outputs = {}, []
for cell in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(cell, namespace)
    outputs.append(output.getvalue())
json.dump(outputs, sys.stdout)
"""


def run_cells(page: Path, folder: str | Path) -> list[str]:
    """What each cell of a page prints; all in one fresh process, in `folder`."""
    cells = [cell for _, cell, _ in CELL.findall(page.read_text(encoding="utf-8"))]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(cells), capture_output=True, text=True, cwd=folder,
        timeout=600, env={**os.environ, **ENVIRONMENT, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def agree(found: str, printed: str, *, percent: float) -> bool:
    """Whether two outputs have the same text, and numbers that differ by at most `percent` of the printed one."""
    numbers = [[float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (found, printed)]
    return NUMBER.split(found) == NUMBER.split(printed) and all(
        abs(one - other) <= percent / 100 * abs(other) for one, other in zip(*numbers, strict=True)
    )


@pytest.mark.parametrize("page", [page for page in PAGES if CELL.search(page.read_text())], ids=lambda page: page.stem)
def test_the_cells_of_a_page_print_what_stands_below_them(page, tmp_path):
    cells = CELL.findall(page.read_text(encoding="utf-8"))
    assert len(cells) == page.read_text().count("```python\n"), "a cell without its output"
    for (percent, cell, printed), found in zip(cells, run_cells(page, tmp_path), strict=True):
        assert agree(found, printed, percent=float(percent or 0)), f"{cell}\nprinted {found!r}\nnot {printed!r}"


def test_outputs_differ_in_their_text_and_in_numbers_beyond_the_tolerance():
    assert agree("loss 1,010.0 of 3\n", "loss 1,000.0 of 3\n", percent=1)
    assert not agree("loss 1.02 of 3\n", "loss 1.00 of 3\n", percent=1)
    assert not agree("loss 1.00 in 3\n", "loss 1.00 of 3\n", percent=1)
    assert not agree("loss 1.00\n", "loss 1.01\n", percent=0)
    assert not agree("loss nan\n", "loss 1.00\n", percent=1)


# ---- "Here: [file](../../file): `name`, `name`" --------------------------------------------------------------

HERE = re.compile(r"\[([\w./-]+)\]\(\.\./\.\./\1\)((?:[,:]?\s`[\w.]+`)*)")


@cache
def names_in(file: Path) -> set[str]:
    """Classes, functions and variables of a module with their qualified names; the keys of a YAML file."""
    content = file.read_text(encoding="utf-8")
    if file.suffix == ".yaml":
        return set(yaml.safe_load(content))

    def visit(node: ast.AST, prefix: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            targets = [getattr(child, "target", None), *getattr(child, "targets", [])]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield prefix + child.name
                yield from visit(child, f"{prefix}{child.name}.")

    return set(visit(ast.parse(content), ""))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_name_that_a_page_quotes_is_in_its_file(page):
    for file, names in HERE.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / file).exists(), file
        missing = set(re.findall(r"`([\w.]+)`", names)) - (names_in(ROOT / file) if names else set())
        assert not missing, f"{file} has no {missing}"


def test_the_lecture_has_its_nineteen_segments_each_with_its_place_and_a_cell():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES if page.stem != "README")
    segments = re.split(r"^## (?=\d+\. )", text, flags=re.MULTILINE)[1:]
    assert [int(segment.split(".")[0]) for segment in segments] == list(range(1, 20))
    for segment in segments:
        assert "\nHere: [" in segment and CELL.search(segment), segment.splitlines()[0]
        assert f"{segment.splitlines()[0]}](" in (ROOT / "docs" / "lecture" / "README.md").read_text()


# ---- commands ------------------------------------------------------------------------------------------------

COMMAND = re.compile(r"(?:\bpython3? -m|\baccelerate launch|\bpython (?=\w+\.py))\b[^\n`|;]*")
WITH_RECIPE = ("gpt2repro.tools.doctor", "gpt2repro.tools.sweep")  # every field of a recipe is also their flag
FOREIGN = ("eval.lm_eval_model",)  # another library's command, with its flags


def quoted_commands(document: Path) -> list[list[str]]:
    """The words of every command in a document, without comments; code in a text may break its line once."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    text = re.sub(r"(?<!`)`[^`\n]+\n[^`\n]+`", lambda span: span[0].replace("\n", " "), text)
    return [command.split(" #")[0].split() for command in COMMAND.findall(text)]


@cache
def flags_of(module: str) -> set[str]:
    """The flags in the answer of a command to --help."""
    with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit):
        importlib.import_module(module).main(["--help"])
    more = flags_of("train_accelerate") if module in WITH_RECIPE else set()
    return {"--help", *re.findall(r"--[\w-]+", output.getvalue())} | more


def launcher_flags() -> set[str]:
    from accelerate.commands.launch import launch_command_parser

    return set(launch_command_parser()._option_string_actions)


def launched_processes(launcher: list[str]) -> int:
    """How many processes the flags of `accelerate launch` start."""
    values = dict(pairwise(launcher))
    file = ROOT / values.get("--config_file", "no such file")
    configured = yaml.safe_load(file.read_text())["num_processes"] if file.is_file() else 1
    return int(values.get("--num_processes", configured))


def check_recipe(words: list[str], *, world_size: int) -> None:
    """Refuse a quoted run that would not start: its recipe must fit the number of processes."""
    if "--recipe" in words and (ROOT / (path := words[words.index("--recipe") + 1])).is_file():
        words = [*words, "--recipe", str(ROOT / path)]
        parse_recipe(words, default=DEFAULT_RECIPE).check(world_size=world_size)


def flags_in(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if re.match(r"--\w", word)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_that_a_document_quotes_exists_and_knows_its_flags(document):
    for words in quoted_commands(document):
        command, unknown, processes = " ".join(words), set(), 1
        if words[0] == "accelerate":
            launcher = list(takewhile(lambda word: word != "-m" and not word.endswith(".py"), words))
            words, unknown = words[len(launcher) :], flags_in(launcher) - launcher_flags()
            processes = launched_processes(launcher)
        else:
            words = words[1:]
        name = words[1] if words[:1] == ["-m"] else "".join(words[:1]).removesuffix(".py")
        if name.split(".")[0] in ("eval", "gpt2repro", "benchmarks", "train_accelerate") and name[-1].isalnum():
            assert importlib.util.find_spec(name), command
            unknown |= set() if name in FOREIGN else flags_in(words) - flags_of(name)
        if name == "train_accelerate" and not unknown and "…" not in command:
            check_recipe(words[1:], world_size=processes)
        missing = [word for word in words if word.startswith(("recipes/", "accelerate_configs/"))]
        missing = [word for word in missing if word.endswith((".yaml", ".sh")) and not (ROOT / word).exists()]
        assert not unknown and not missing, f"{command}: unknown {unknown or missing}"


def record(page: Path) -> None:
    """Write what the cells of a page print now into it."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = iter(run_cells(page, folder))
    text = page.read_text(encoding="utf-8")
    page.write_text(CELL.sub(lambda cell: cell[0][: cell.start(3) - cell.start()] + next(outputs) + "```", text))


if __name__ == "__main__":
    for lecture_page in PAGES:
        record(lecture_page)
