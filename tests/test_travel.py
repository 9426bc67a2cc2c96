"""A checkpoint away from home: in fresh processes, in an empty folder, without the checkout on any path."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

# An editable install would let the checkout be found after all.
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


def test_the_wheel_in_an_empty_venv_is_two_modules_and_one_package(tmp_path):
    source = shutil.copytree(
        ROOT, tmp_path / "source",
        ignore=shutil.ignore_patterns(".*", "runs", "data", "tests", "build", "dist", "*.egg-info", "__pycache__"),
    )  # fmt: skip
    # `data` is also a room of the package.
    shutil.copytree(
        ROOT / "gpt2repro" / "data", source / "gpt2repro" / "data", ignore=shutil.ignore_patterns("__pyc*")
    )
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source],
        check=True, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "configuration_gpt2repro.py", "modeling_gpt2repro.py", "gpt2repro",
    }  # fmt: skip
    venv.create(tmp_path / "venv", with_pip=False)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", tmp_path / "venv", "install", "--quiet", "--no-deps", wheel],
        check=True, timeout=600,
    )  # fmt: skip
    (site_packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    assert {path.name for path in site_packages.iterdir() if path.suffix != ".dist-info"} - {"__pycache__"} == {
        "configuration_gpt2repro.py", "modeling_gpt2repro.py", "gpt2repro",
    }  # fmt: skip
    python("import modeling_gpt2repro, gpt2repro.recipe, gpt2repro.hub.convert", tmp_path, paths=(site_packages,))
