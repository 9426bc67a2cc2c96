"""docs/lecture, docs/library.md and docs/tutorials do what they print, and the documents name only what there is.

    python -m tests.test_lecture [FILE …]      # runs every cell and writes its output into the pages and notebooks
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

LECTURE = sorted((ROOT / "docs" / "lecture").glob("*.md"))
PAGES = [*LECTURE, ROOT / "docs" / "library.md"]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
DOCUMENTS = [ROOT / "README.md", ROOT / "Makefile", *sorted((ROOT / "docs").glob("*.md")), *LECTURE, *NOTEBOOKS]
CELL = re.compile(r"(?:<!-- numbers within ([\d.]+) % -->\n)?```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
RUNNER = """
import base64, contextlib, io, json, sys
import matplotlib.pyplot as plt
namespace, outputs = {}, []
for cell in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(cell, namespace)
    pictures = []
    for number in plt.get_fignums():
        plt.figure(number).savefig(png := io.BytesIO(), dpi=100)
        pictures.append(base64.b64encode(png.getvalue()).decode())
    plt.close("all")
    outputs.append([output.getvalue(), pictures])
json.dump(outputs, sys.stdout)
"""


def cells_of(page: Path) -> list[tuple[float, str, str]]:
    """Each cell of a page or notebook: by how many percent its numbers may differ, its code, what is printed below."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        return [(float(percent or 0), cell, printed) for percent, cell, printed in CELL.findall(text)]
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    printed = ["".join(line for output in cell["outputs"] for line in output.get("text", ())) for cell in cells]
    return [(cell["metadata"].get("percent", 0), "".join(cell["source"]), below)
            for cell, below in zip(cells, printed, strict=True)]  # fmt: skip


def run_cells(page: Path, folder: str | Path) -> list[tuple[str, list[str]]]:
    """What each cell prints, and its pictures as PNG in base64; all cells in one fresh process, in `folder`."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps([cell for _, cell, _ in cells_of(page)]), text=True,
        capture_output=True, cwd=folder, timeout=600,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def agree(found: str, printed: str, *, percent: float) -> bool:
    """Whether two outputs have the same text, and numbers that differ by at most `percent` of the printed one."""
    numbers = [[float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (found, printed)]
    return NUMBER.split(found) == NUMBER.split(printed) and all(
        abs(one - other) <= percent / 100 * abs(other) for one, other in zip(*numbers, strict=True)
    )


RUN = [page for page in [*PAGES, *NOTEBOOKS] if page.suffix == ".ipynb" or CELL.search(page.read_text())]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_cells_of_a_page_print_what_stands_below_them(page, tmp_path):
    cells = cells_of(page)
    if page.suffix == ".md":
        assert len(cells) == page.read_text().count("```python\n"), "a cell without its output"
    for (percent, cell, printed), (found, _) in zip(cells, run_cells(page, tmp_path), strict=True):
        assert agree(found, printed, percent=percent), f"{cell}\nprinted {found!r}\nnot {printed!r}"


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
    text = "".join(page.read_text(encoding="utf-8") for page in LECTURE if page.stem != "README")
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
    text = document.read_text(encoding="utf-8")
    if document.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] != "code")
    text = text.replace("\\\n", " ")
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
    """Write what the cells of a page or notebook print now into it."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = iter(run_cells(page, folder))
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        page.write_text(
            CELL.sub(lambda cell: cell[0][: cell.start(3) - cell.start()] + next(outputs)[0] + "```", text)
        )
        return
    notebook = json.loads(text)
    for cell in (cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        printed, pictures = next(outputs)
        stream = {"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)}
        cell["outputs"] = [stream] if printed else []
        cell["outputs"] += [
            {"data": {"image/png": png}, "metadata": {}, "output_type": "display_data"} for png in pictures
        ]
    page.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for named in map(Path, sys.argv[1:] or RUN):
        record(named)
