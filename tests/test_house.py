"""The rules of the house: who imports whom, and what may import without the heavy packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

ORDER = ["configuration_gpt2repro", "modeling_gpt2repro", "gpt2repro", "eval", "train_accelerate"]
FLAT = ORDER[:2]
ROOMS = sorted(path for name in ORDER for path in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/**/*.py")])


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_stands_to_its_left(path):
    own = path.relative_to(ROOT).with_suffix("").parts
    ours = {name for name in imports(path) if name.split(".")[0] in ORDER}
    right = {name for name in ours if ORDER.index(name.split(".")[0]) > ORDER.index(own[0])}
    assert not right
    if own[:2] in (("gpt2repro", "data"), ("gpt2repro", "training")):
        other = {"data": "training", "training": "data"}[own[1]]
        assert not {name for name in ours if name in FLAT or name.startswith(f"gpt2repro.{other}")}


def test_the_files_that_travel_with_checkpoints_import_nothing_else_of_ours():
    for name in FLAT:
        packages = {module.lstrip(".").split(".")[0] for module in imports(ROOT / f"{name}.py")}
        assert packages <= {"math", "torch", "transformers", "huggingface_hub", "configuration_gpt2repro"}


def test_nothing_is_called_utils():
    assert not [path for path in ROOMS if path.stem in ("utils", "helpers", "misc", "common", "manager")]


def test_training_and_scoring_import_on_a_bare_gpu_machine():
    """One that has torch, transformers, accelerate, safetensors, numpy, pyyaml and tqdm, and nothing else."""
    code = (
        "import sys\n"
        "for name in ('datasets', 'evaluate', 'matplotlib', 'lm_eval', 'pandas', 'pyarrow', 'zstandard'):\n"
        "    sys.modules[name] = None\n"
        "import train_accelerate, eval.validation, eval.sample, eval.hellaswag, eval.multiple_choice\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_and_nothing_trusts_foreign_code_unasked(path):
    """One weights-only load in convert.py aside; trust is somebody's variable, never a constant."""
    for call in (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        always = {key for key, value in given.items() if isinstance(value, ast.Constant) and value.value is True}
        assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "eval", "exec")
        assert name != "torch.load" or (path.name == "convert.py" and "weights_only" in always)
        assert not always & {"allow_pickle", "trust_remote_code"}
