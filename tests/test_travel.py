"""A checkpoint and the wheel without the checkout: in fresh processes and an empty folder."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Of this environment; one that lies over another has two folders of them.
LIBRARIES = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
# An editable install would make the checkout importable.
FORGET_THE_CHECKOUT = """
import sys, importlib.util
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
assert importlib.util.find_spec("modeling_gpt2repro") is None
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
import torch
"""


@pytest.fixture(scope="module")
def away(unbroken_run, tmp_path_factory) -> Path:
    """An empty folder with a copy of a checkpoint in it."""
    folder = tmp_path_factory.mktemp("away")
    shutil.copytree(unbroken_run / "latest", folder / "checkpoint")
    return folder


def python(code: str, folder: Path, *, paths: tuple[Path, ...] = ()) -> str:
    """What a fresh process prints that runs `code` in `folder`, with a cache of its own."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_auto_class_loads_a_checkpoint_with_trust_remote_code(away):
    python(
        FORGET_THE_CHECKOUT
        + """
config = AutoConfig.from_pretrained("checkpoint", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("checkpoint")
bare = AutoModel.from_pretrained("checkpoint", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("checkpoint", trust_remote_code=True)
assert config.model_type == "gpt2repro" and config.n_embd == 32 and len(tokenizer) == config.vocab_size == 512
assert type(bare).__name__ == "GPT2ReproModel" and type(model).__name__ == "GPT2ReproForCausalLM"
ids = tokenizer("Return the length", return_tensors="pt").input_ids
with torch.no_grad():
    states = bare(ids).last_hidden_state
    assert torch.equal(model.lm_head(states), model(ids).logits)
    assert torch.equal(model.transformer.wte.weight, model.lm_head.weight)
""",
        away,
    )


def test_a_checkpoint_saved_again_loads_again_with_its_code(away):
    python(
        FORGET_THE_CHECKOUT
        + """
model = AutoModelForCausalLM.from_pretrained("checkpoint", trust_remote_code=True)
model.save_pretrained("again")
AutoTokenizer.from_pretrained("checkpoint").save_pretrained("again")
del model
""",
        away,
    )
    shutil.rmtree(away / "cache")
    for name in ("configuration_gpt2repro.py", "modeling_gpt2repro.py"):
        assert (away / "again" / name).read_bytes() == (ROOT / name).read_bytes()
    assert (away / "again" / "model.safetensors").read_bytes() == (
        away / "checkpoint" / "model.safetensors"
    ).read_bytes()
    python(
        FORGET_THE_CHECKOUT
        + """
AutoModel.from_pretrained("again", trust_remote_code=True)
AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
""",
        away,
    )


def test_the_text_generation_pipeline_runs_on_a_checkpoint(away):
    output = python(
        FORGET_THE_CHECKOUT
        + """
generator = pipeline("text-generation", model="checkpoint", trust_remote_code=True)
print(generator("Return the", max_new_tokens=5, do_sample=False)[0]["generated_text"])
""",
        away,
    )
    assert output.startswith("Return the")


def test_after_importing_the_modeling_file_no_trust_is_needed(away):
    python(
        """
import modeling_gpt2repro
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("checkpoint")
assert type(model) is modeling_gpt2repro.GPT2ReproForCausalLM
assert type(AutoModel.from_pretrained("checkpoint")) is modeling_gpt2repro.GPT2ReproModel
""",
        away,
        paths=(ROOT,),
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A virtual environment with nothing but the wheel of this checkout in it."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "runs", "tests", "build", "dist", "*.egg-info", "__pycache__", "*.npy")
    source = shutil.copytree(ROOT, folder / "source", ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source],
        check=True, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", folder / "venv", "install", "--quiet", "--no-deps", wheel],
        check=True, timeout=600,
    )  # fmt: skip
    return folder / "venv"


def run_installed(installed: Path, folder: Path, *command: str) -> str:
    """What a program of the environment prints that runs in `folder`; the libraries come from this environment."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [installed / "bin" / command[0], *command[1:]], cwd=folder, capture_output=True, text=True, timeout=600,
        env={**env, "PYTHONPATH": LIBRARIES, "OMP_NUM_THREADS": "1", "COLUMNS": "1000"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_is_three_modules_and_one_package_with_every_file(installed):
    (site_packages,) = installed.glob("lib/python*/site-packages")
    assert {path.name for path in site_packages.iterdir() if path.suffix != ".dist-info"} - {"__pycache__"} == {
        "configuration_gpt2repro.py", "modeling_gpt2repro.py", "train_accelerate.py", "gpt2repro",
    }  # fmt: skip
    package = site_packages / "gpt2repro"
    expected = {file.relative_to(ROOT / "gpt2repro") for file in ROOT.glob("gpt2repro/**/*.*")}
    expected |= {file.relative_to(ROOT) for file in [*ROOT.glob("eval/*.py"), *ROOT.glob("recipes/*.yaml")]}
    expected = {file for file in expected if file.suffix != ".pyc"}
    found = {file.relative_to(package) for file in package.rglob("*.*") if file.suffix != ".pyc"}
    assert found == expected


def test_the_installed_command_lists_its_commands_and_trains_with_the_recipe_inside(installed, tmp_path):
    listed = run_installed(installed, tmp_path, "gpt2repro", "--help")
    assert "eval hellaswag" in listed and "usage: gpt2repro COMMAND" in listed
    trained = run_installed(installed, tmp_path, "gpt2repro", "train", "--help")
    assert trained.startswith("usage: gpt2repro train ")
    (recipe,) = installed.glob("lib/python*/site-packages/gpt2repro/recipes/demo.yaml")
    assert str(recipe) in trained


def test_every_installed_command_explains_itself_in_an_empty_folder(installed, tmp_path):
    """All in one process, because the imports of the libraries take most of the time."""
    code = """
from contextlib import redirect_stdout
from io import StringIO
from gpt2repro import command
for name in command.COMMANDS:
    printed = StringIO()
    try:
        with redirect_stdout(printed):
            command.main([*name.split(), "--help"])
    except SystemExit as end:
        assert end.code == 0, name
    assert printed.getvalue().startswith("usage: "), name
import train_accelerate
assert "site-packages" in train_accelerate.__file__
"""
    run_installed(installed, tmp_path, "python", "-c", code)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["train_accelerate", "gpt2repro.eval.hellaswag", "gpt2repro.hub.convert"])
def test_an_installed_module_runs_with_python_m(installed, tmp_path, module):
    assert "usage: " in run_installed(installed, tmp_path, "python", "-m", module, "--help")
