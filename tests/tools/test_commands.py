"""What commands have in common: help, flags, a standard output that is closed or full, old names of three of them."""

import importlib
import subprocess
import sys

import pytest

from gpt2repro.eval import flags
from tests.conftest import ROOT

DEFAULTS = {"app": "7860", "doctor": "1", "sweep": "1", "verify": "openai-community/gpt2"}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_help_of_a_command_names_the_defaults_of_its_flags(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"gpt2repro.tools.{name}").main(["--help"])
    assert f"(default: {DEFAULTS[name]}" in capsys.readouterr().out


def test_the_home_folder_is_expanded_in_every_flag_but_a_prompt(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = flags.validation(None, ["--model=~/model", "--texts", "~/a.txt", "b~.txt", "--output=~/new.json"])
    assert (found.model, found.text, found.output) == ("/home/me/model", ["/home/me/a.txt", "b~.txt"],
                                                       "/home/me/new.json")  # fmt: skip
    assert flags.sample(None, ["--model", "m", "--prompt", "~/a"]).prompt == "~/a"


@pytest.mark.parametrize(
    ("redirection", "code", "error"),
    [(">&-", 0, ""), (">&- 2>&-", 0, ""), (">/dev/full", 1, "error: [Errno 28] No space left on device\n")],
)
def test_a_standard_output_that_is_closed_or_full_is_no_traceback(redirection, code, error):
    words = [sys.executable, "-c", "import sys; from gpt2repro.command import main; sys.exit(main())", "--help"]
    shell = ["sh", "-c", f'"$@" {redirection}', "sh", *words]
    done = subprocess.run(shell, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (code, error)


@pytest.mark.parametrize("name", ["app", "doctor", "report"])
def test_the_old_name_of_a_command_runs_it(name):
    words = [sys.executable, "-m", f"eval.{name}", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f"python -m gpt2repro.tools.{name} " in done.stdout
