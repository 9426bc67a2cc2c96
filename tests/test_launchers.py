"""The launchers of docs/launchers: run where that is possible here, else parsed by what their own tool reads."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from gpt2repro.recipe_parser import DEFAULT_RECIPE, parse_recipe
from tests.conftest import ROOT, TINY

LAUNCHERS = ROOT / "docs" / "launchers"
DOCKERFILE, HF_JOB = LAUNCHERS / "Dockerfile", LAUNCHERS / "hf_job.py"
SKY = yaml.safe_load((LAUNCHERS / "sky.yaml").read_text())


def test_the_notebook_runs_from_top_to_bottom(tiny_dataset, tmp_path, monkeypatch):
    """On a CPU, with a tiny model in the place of the demo."""
    reason = "nbclient and ipykernel are not installed: pip install -c constraints.txt nbclient ipykernel"
    nbclient, nbformat = (pytest.importorskip(name, reason=reason) for name in ("nbclient", "nbformat"))
    pytest.importorskip("ipykernel", reason=reason)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(LAUNCHERS / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    settings = next(cell for cell in notebook.cells if cell.id == "settings")
    flags = " ".join(f"--{name} {value}" for name, value in {**TINY, "dataset_dir": tiny_dataset}.items())
    settings.source += f"\nFLAGS, RUN = {flags!r}, {str(tmp_path / 'run')!r}"
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = {cell.id: json.dumps(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"}
    assert "done: step 8" in outputs["train"]
    assert "image/png" in outputs["curves"]
    assert "Return the" in outputs["sample"]


def test_the_hf_jobs_script_asks_for_what_the_project_needs():
    block = re.search(r"(?m)^# /// script\n((?:^#(?: .*)?\n)+)^# ///$", HF_JOB.read_text())
    asked = tomllib.loads("".join(line[2:] for line in block[1].splitlines(keepends=True)))  # as PEP 723 reads it
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert asked == {"requires-python": project["requires-python"], "dependencies": project["dependencies"]}


def test_the_hf_jobs_script_starts_training(tmp_path):
    environment = {**os.environ, "CODE": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, HF_JOB, "--recipe", "no.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "there is no recipe at no.yaml" in done.stderr and done.returncode == 1


def test_hf_jobs_own_dry_run_takes_the_command_of_the_script():
    hf = [sys.executable, "-m", "huggingface_hub.cli.hf"]
    if "--dry-run" not in subprocess.run([*hf, "jobs", "uv", "run", "--help"], capture_output=True, text=True).stdout:
        pytest.skip("this huggingface_hub has no `hf jobs uv run --dry-run`")
    (command,) = commands(HF_JOB.read_text(), "hf jobs uv run")
    words = [*hf, *command[1:4], "--dry-run", *command[4:]]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "NO_COLOR": "1"}, capture_output=True, text=True)
    assert "(dry run) Job not submitted" in done.stdout, done.stderr


def commands(text: str, start: str) -> list[list[str]]:
    """The shell commands in a text that begin with `start`, lines joined, as words."""
    joined = re.sub(r"\\\n[ #]*", " ", text)
    return [shlex.split(line.strip(" #")) for line in joined.splitlines() if line.strip(" #").startswith(start)]


@pytest.mark.parametrize("file", ["hf_job.py", "sky.yaml", "Dockerfile"])
def test_the_flags_of_a_launcher_are_those_of_a_recipe_that_is_sound(file):
    text = re.sub(r"\\\n[ #]*", " ", (LAUNCHERS / file).read_text()).replace("/gpt2repro/recipes", "recipes")
    (flags,) = re.findall(r"(--recipe recipes/.*)", text)
    words = shlex.split(flags.replace("$OWNER", "me"))
    words = [f"{ROOT}/{word}" if word.startswith("recipes/") else word for word in words]
    parse_recipe(words, default=DEFAULT_RECIPE).check()


def test_skypilots_own_schema_takes_the_task():
    schemas = pytest.importorskip("sky.utils.schemas", reason="SkyPilot is not installed: pip install skypilot")
    import jsonschema

    jsonschema.validate(SKY, schemas.get_task_schema())
    jsonschema.validate(SKY["resources"], schemas.get_resources_schema())


def test_the_skypilot_task_names_what_this_checkout_has():
    words = shlex.split(SKY["run"].replace("\\\n", " "))
    assert all((ROOT / word).exists() for word in words if word.startswith(("accelerate_configs/", "recipes/")))
    assert "train_accelerate.py" in words and SKY["resources"]["use_spot"] is True


def test_the_dockerfile_copies_what_an_installation_needs():
    lines = [shlex.split(line) for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    copied = {source for line in lines if line[0] == "COPY" for source in line[1:-1]}
    assert all((ROOT / source).exists() for source in copied)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    needed = {f"{name}.py" for name in settings["py-modules"]} | {"gpt2repro", *settings["package-dir"].values()}
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "accelerate_configs", *needed} <= copied


def test_hours_and_dollars_of_the_table_follow_from_its_speeds_and_prices():
    row = r"\| ([\w ]+) \| ([\d,]+) \| .* \| \$([\d.]+) \| ([\d.]+) h, \$(\d+) \| ([\d.]+) h, \$(\d+) \|"
    rows = re.findall(row, (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8"))
    assert [card for card, *_ in rows] == ["T4", "RTX 4090", "A100", "H100"]
    for _, speed, price, *cells in rows:
        hours = [tokens / int(speed.replace(",", "")) / 3600 for tokens in (2.5e9, 10e9)]
        assert cells == [cell for each in hours for cell in (f"{each:.1f}", f"{each * float(price):.0f}")]
