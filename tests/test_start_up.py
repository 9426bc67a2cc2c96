"""What a person waits for: `--help` and wrong usage answer before torch and transformers are imported."""

import os
import subprocess
import sys

import pytest

from gpt2repro.command import COMMANDS
from tests.conftest import ROOT

SECONDS = 1.0  # of processor time; the libraries take more than two
WRONG_FIELDS = {
    "train": [["--sed", "1"], ["--max_steps", "many"], ["--schedule", "cosin"], ["--micro_batch_size", "7"]],
    "doctor": [["recipes/demo.yaml", "--sed", "1"]],
    "sweep": [["recipes/demo.yaml", "--set", "seed=1", "--output", "runs/none", "--sed", "1"]],
}


def run(words: list[str]) -> tuple[int, float]:
    """The exit code and the processor time of a process, which no other process of a busy machine lengthens."""
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime


def installed(name: str) -> list[str]:
    """The console script `gpt2repro`, without an installation."""
    return [sys.executable, "-c", "import sys; from gpt2repro.command import main; sys.exit(main())", *name.split()]


def in_a_checkout(name: str) -> list[str]:
    if name == "train":
        return [sys.executable, "train_accelerate.py"]
    return [sys.executable, "-m", COMMANDS[name].replace("gpt2repro.eval", "eval")]


@pytest.mark.parametrize("start", [installed, in_a_checkout])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_an_unknown_flag_answer_at_once(name, start):
    for word, expected in (("--help", 0), ("--no-such-flag", 2)):
        code, seconds = run([*start(name), word])
        assert code == expected
        assert seconds < SECONDS


@pytest.mark.parametrize(("name", "words"), [(name, words) for name in WRONG_FIELDS for words in WRONG_FIELDS[name]])
def test_a_wrong_field_of_a_recipe_answers_at_once(name, words):
    code, seconds = run([*installed(name), *words])
    assert code in (1, 2)
    assert seconds < SECONDS


def test_ctrl_c_during_the_imports_is_one_line():
    code = "from gpt2repro import command\ncommand.parse_early(lambda: None)\nraise KeyboardInterrupt\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stderr == "error: interrupted; run the same command again\n"
