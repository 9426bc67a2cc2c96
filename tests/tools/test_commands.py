"""What the commands of this folder have in common: their help, and the old names of three of them."""

import importlib
import subprocess
import sys

import pytest

from tests.conftest import ROOT

DEFAULTS = {"app": "7860", "doctor": "1", "sweep": "1", "verify": "openai-community/gpt2"}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_help_of_a_command_names_the_defaults_of_its_flags(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"gpt2repro.tools.{name}").main(["--help"])
    assert f"(default: {DEFAULTS[name]}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["app", "doctor", "report"])
def test_the_old_name_of_a_command_runs_it(name):
    words = [sys.executable, "-m", f"eval.{name}", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f"python -m gpt2repro.tools.{name} " in done.stdout
