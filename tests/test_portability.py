"""What Windows lacks: modules and signals of POSIX, and the right to make links. Nothing was run on Windows itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from gpt2repro.eval.loading import load_model
from gpt2repro.files import link_to, linked
from gpt2repro.run.checkpoints import find_checkpoint
from tests.conftest import ROOT
from tests.test_house import MODULES

FOR_OTHER_LIBRARIES = {"eval.accuracy_metric", "eval.lm_eval_model"}  # register themselves there, and only once
POSIX_MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
POSIX_SIGNALS = ("SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")


def test_every_module_imports_without_what_posix_has_alone():
    code = f"""
import importlib, os, signal, sys
names = {sorted(set(MODULES) - FOR_OTHER_LIBRARIES)}
for name in names:  # other libraries are imported as on this system
    importlib.import_module(name)
for name in [*sys.modules]:
    if name.split(".")[0] in ("eval", "gpt2repro", "train_accelerate"):
        del sys.modules[name]
sys.modules.update(dict.fromkeys({POSIX_MODULES}))
for name in {POSIX_SIGNALS}:
    delattr(signal, name)
for name in ("getppid", "sysconf", "fork", "killpg", "uname", "pread"):
    delattr(os, name)
for name in names:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def no_links(monkeypatch):
    def refuse(self, target):
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)


@pytest.mark.usefixtures("no_links")
def test_latest_is_a_file_where_links_are_refused(tmp_path):
    for name in ("step-00000001", "step-00000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").touch()
        link_to(tmp_path / name, tmp_path / "latest")
        assert linked(tmp_path / "latest") == tmp_path / name
    assert find_checkpoint(tmp_path, str(tmp_path / "latest")) == tmp_path / "step-00000002"


@pytest.mark.usefixtures("no_links")
def test_a_model_loads_through_the_file_latest(unbroken_run, tmp_path):
    (tmp_path / "step-00000008").mkdir()
    for file in (unbroken_run / "latest").iterdir():
        (tmp_path / "step-00000008" / file.name).hardlink_to(file)
    link_to(tmp_path / "step-00000008", tmp_path / "latest")
    model, _ = load_model(str(tmp_path / "latest"), device="cpu")
    assert model.config.n_layer == 2


def test_other_paths_stay_as_they_are(tmp_path):
    (tmp_path / "file").write_text("nothing of that name")
    for path in (tmp_path, tmp_path / "file", tmp_path / "missing", Path("openai-community/gpt2")):
        assert linked(path) == path
