"""Every row of docs/compatibility.md is a test, and every test of this folder has a row."""

import ast
import importlib.metadata
import re
from pathlib import Path

from tests.conftest import ROOT

HERE = Path(__file__).parent
ROW = re.compile(r"^\| .+ \| (?P<libraries>[^|]+) \| (?P<file>[\w/]+\.py)::(?P<test>test_\w+) \|$", re.MULTILINE)


def defined_in(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_row_names_a_test_and_the_version_that_it_ran_with():
    table = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    rows = list(ROW.finditer(table))
    for row in rows:
        assert row["test"] in defined_in(ROOT / "tests" / row["file"]), row[0]
        for library in row["libraries"].split(", "):
            name, version = library.split()
            assert version == (pins.get(name) or importlib.metadata.version(name)).strip(), row[0]
    listed = {(row["file"], row["test"]) for row in rows}
    here = {(f"compatibility/{path.name}", test) for path in HERE.glob("test_*.py") for test in defined_in(path)}
    assert not {entry for entry in here if entry[0] != "compatibility/test_table.py"} - listed
