"""The rules of the architecture: who imports whom, who knows a run's file names, and what must stay small."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from tests.conftest import ROOT, SCRIPT

TRAVELLERS = {"configuration_gpt2repro", "modeling_gpt2repro"}  # they are copied into every checkpoint
LEAVES = {f"gpt2repro.{name}" for name in ("command", "files", "own_text", "processes", "recipe", "recipe_parser")}
LIBRARY = {f"gpt2repro.{name}" for name in ("data", "train", "run", "hub", "hub.upload")}
# A module or package, and what it may import of ours. Everything is listed; `gpt2repro.X` stands for all inside.
ALLOWED = {
    "configuration_gpt2repro": set(),
    "modeling_gpt2repro": {"configuration_gpt2repro"},
    "gpt2repro": {"gpt2repro.command"},
    "gpt2repro.command": set(),
    "gpt2repro.files": set(),
    "gpt2repro.processes": set(),
    "gpt2repro.recipe": {"configuration_gpt2repro"},
    "gpt2repro.own_text": {"gpt2repro.command", "gpt2repro.recipe"},
    "gpt2repro.recipe_parser": {"gpt2repro.command", "gpt2repro.own_text", "gpt2repro.recipe"},
    "gpt2repro.hub.upload": set(),  # the client of the Hub
    "gpt2repro.data": LEAVES | {"gpt2repro.hub.upload"},
    "gpt2repro.train": LEAVES,
    "gpt2repro.run": LEAVES,
    # a model card is written from the run's record
    "gpt2repro.hub": LEAVES | TRAVELLERS | {"gpt2repro.run", "gpt2repro.hub.upload"},
    "eval": LEAVES | TRAVELLERS | LIBRARY | {"gpt2repro"},
    "gpt2repro.tools": LEAVES | TRAVELLERS | LIBRARY | {"eval", "train_accelerate"},
    "train_accelerate": LEAVES | LIBRARY | {"eval", "gpt2repro"},
}
FORWARDING = {"eval.app", "eval.doctor", "eval.report"}  # older names of commands in gpt2repro.tools
RUN_FILES = ("run.json", "recipe.yaml", "metrics.jsonl", "trainer_state.json", "optimizer.safetensors")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = [*ROOT.glob("*_gpt2repro.py"), SCRIPT, *ROOT.glob("gpt2repro/**/*.py"), *ROOT.glob("eval/**/*.py")]
MODULES = {module_name(path): path for path in sorted(PATHS)}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_names(module: str) -> set[str]:
    """Every module or name that a module imports, anywhere in it; gpt2repro.eval is eval."""
    path, names = MODULES[module], set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return {name.removeprefix("gpt2repro.") if name.startswith("gpt2repro.eval.") else name for name in names}


def our_imports(module: str) -> set[str]:
    """The modules of ours that a module imports."""
    found = set()
    for name in imported_names(module):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", module}


def room_of(module: str) -> str:
    """The entry of ALLOWED that a module belongs to."""
    return max((room for room in ALLOWED if module == room or module.startswith(f"{room}.")), key=len)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_is_allowed(module):
    room = room_of(module)
    assert room != "gpt2repro" or module == "gpt2repro", f"{module} is in none of the packages"
    allowed = ALLOWED[room] | {room} | ({"gpt2repro.tools"} if module in FORWARDING else set())
    assert {name for name in our_imports(module) if room_of(name) not in allowed} == set()


def test_modules_import_each_other_in_no_circle():
    below: dict[str, set[str]] = {}  # all that a module imports, directly or not

    def visit(module: str, path: tuple[str, ...]) -> set[str]:
        assert module not in path, " imports ".join([*path[path.index(module) :], module])
        if module not in below:
            imports = our_imports(module)
            below[module] = imports.union(*(visit(name, (*path, module)) for name in imports))
        return below[module]

    for module in MODULES:
        visit(module, ())


def test_the_files_that_travel_with_checkpoints_import_nothing_else_of_ours():
    for module in TRAVELLERS:
        packages = {name.split(".")[0] for name in imported_names(module)}
        allowed = {"torch", "transformers", "huggingface_hub", "configuration_gpt2repro"}
        assert packages - sys.stdlib_module_names <= allowed


def test_only_the_package_of_the_run_spells_the_names_of_a_runs_files():
    spelt = []
    for module, path in MODULES.items():
        if room_of(module) == "gpt2repro.run":
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if node.value.rsplit("/", 1)[-1] in RUN_FILES:
                    spelt.append(f"{module}, line {node.lineno}: {node.value}")
    assert spelt == []


def code_lines(path: Path) -> int:
    """Lines of code, without blank lines, comments and docstrings."""
    no_code = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type not in no_code:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_the_script_is_short_has_no_class_and_shows_the_optimizer_step():
    nodes = list(ast.walk(tree_of(SCRIPT)))
    assert code_lines(SCRIPT) <= 260
    assert sum(name.startswith(("gpt2repro.", "eval.")) for name in imported_names("train_accelerate")) <= 25
    assert not [node for node in nodes if isinstance(node, ast.ClassDef)]
    calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    step = {"micro_steps", "accelerator.no_sync", "model", "accelerator.backward", "accelerator.clip_grad_norm_",
            "optimizer.step", "optimizer.zero_grad", "lr_at"}  # fmt: skip
    assert step <= calls


def test_nothing_is_called_utils():
    assert not {path.stem for path in MODULES.values()} & {"utils", "helpers", "misc", "common", "manager"}


def test_training_and_scoring_import_on_a_bare_gpu_machine():
    """One with torch, transformers, accelerate, safetensors, numpy, pyyaml and tqdm, and nothing else."""
    code = (
        "import sys\n"
        "for name in ('datasets', 'evaluate', 'matplotlib', 'lm_eval', 'pandas', 'pyarrow', 'zstandard'):\n"
        "    sys.modules[name] = None\n"
        "import train_accelerate, eval.validation, eval.sample, eval.hellaswag, eval.multiple_choice\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_unpickles_and_nothing_trusts_foreign_code_unasked(module):
    """Except one weights-only load for nanoGPT's checkpoints; trust is a variable of the caller, never a constant."""
    for call in (node for node in ast.walk(tree_of(MODULES[module])) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        always = {key for key, value in given.items() if isinstance(value, ast.Constant) and value.value is True}
        assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "eval", "exec")
        assert name != "torch.load" or (room_of(module) == "gpt2repro.hub" and "weights_only" in always)
        assert not always & {"allow_pickle", "trust_remote_code"}
