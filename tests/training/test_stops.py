"""Signals and lost ranks: every process stops at one step or at once, and the same command goes on to the same bits.

The tests stop one run, each wherever the one before left it, until one ends it and compares it with the unbroken run.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import train_accelerate
from gpt2repro.training.metrics import read_metrics
from tests.conftest import ROOT, TrainScript, train_rows
from tests.test_train import assert_same_bits

FIELDS = {"max_steps": 400, "save_every": 10, "eval_every": 100, "eval_tokens": 20_000}


class Stopped:
    """The run in `folder`: start it, wait for a moment, see how it ends."""

    def __init__(self, script: TrainScript, folder: Path, **fields) -> None:
        self.script, self.folder, self.fields = script, folder, {**FIELDS, **fields}

    def start(self, processes: int = 1) -> subprocess.Popen:
        self.log_before = self._log()
        return self.script.start(self.folder, processes=processes, **self.fields)

    def _log(self) -> int | None:
        log = self.folder / "metrics.jsonl"
        return log.stat().st_ino if log.exists() else None

    def step(self) -> int:
        """The last step that this start has trained; 0 before its first."""
        if self._log() in (None, self.log_before):  # a start writes a log of its own
            return 0
        last = max((row["step"] for row in read_metrics(self.folder / "metrics.jsonl")), default=0)
        return last if last > self.saved() else 0

    def saved(self) -> int:
        return max((int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*")), default=0)

    def wait(self, process: subprocess.Popen, until: Callable[[], object]) -> None:
        deadline = time.monotonic() + 120
        while not until():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def end(self, process: subprocess.Popen, *, seconds: float = 60) -> str:
        output, _ = process.communicate(timeout=seconds)
        return output

    def assert_saved_and_stopped(self, output: str) -> None:
        assert f"stopped by a signal after saving step {self.saved()}" in output
        assert not list(self.folder.glob(".step-*.tmp"))
        assert max(train_rows(self.folder)) == self.saved() < FIELDS["max_steps"]


@pytest.fixture(scope="module")
def unbroken(train_script, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("stops") / "unbroken"
    train_script(run_dir, **FIELDS)
    return run_dir


@pytest.fixture(scope="module")
def run(train_script, tmp_path_factory) -> Stopped:
    return Stopped(train_script, tmp_path_factory.mktemp("stops") / "run")


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(launcher.pid).children()


def test_a_second_start_of_a_run_that_is_alive_is_refused_and_disturbs_nothing(run, capsys):
    process = run.start()
    run.wait(process, run.step)
    assert train_accelerate.main(run.script.flags(run.folder, **run.fields)) == 1
    assert f"error: another process trains in {run.folder}: end it" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    output = run.end(process)
    assert process.returncode == 75, output
    run.assert_saved_and_stopped(output)


def test_a_signal_during_the_imports_ends_the_process_at_once_and_leaves_nothing(train_script, tmp_path):
    process = train_script.start(tmp_path / "run")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR2])
def test_a_signal_saves_and_ends_with_75(run, number):
    process = run.start()
    run.wait(process, run.step)
    process.send_signal(number)
    output = run.end(process)
    assert process.returncode == 75, output
    run.assert_saved_and_stopped(output)


def test_a_signal_during_a_validation_saves_after_the_next_step(run):
    process = run.start()
    first = max(train_rows(run.folder)) if run.saved() else 0
    due = (first // 100 + 1) * 100
    log = run.folder / "metrics.jsonl"
    run.wait(process, lambda: run.step() and f'"step": {due}, "kind": "train"' in log.read_text())
    process.send_signal(signal.SIGTERM)
    assert f'"step": {due}, "kind": "val"' not in log.read_text()
    output = run.end(process)
    assert process.returncode == 75, output
    run.assert_saved_and_stopped(output)
    assert run.saved() == due + 1
    assert due in train_rows(run.folder, "val")


def test_a_signal_during_a_save_saves_again_after_the_next_step(run):
    process = run.start()
    run.wait(process, lambda: run.step() and list(run.folder.glob(".step-*.tmp")))
    process.send_signal(signal.SIGTERM)
    output = run.end(process)
    assert process.returncode == 75, output
    run.assert_saved_and_stopped(output)


@pytest.mark.parametrize(
    "signalled",
    [
        lambda launcher, ranks: [launcher],
        lambda launcher, ranks: ranks[1:],
        lambda launcher, ranks: [launcher, *ranks],  # as a scheduler does; the launcher then passes it on once more
    ],
    ids=["the launcher", "one rank", "all processes"],
)
def test_sigterm_to_some_of_two_processes_stops_both_at_one_step(run, signalled):
    launcher = run.start(processes=2)
    run.wait(launcher, run.step)
    for process in signalled(launcher, ranks_of(launcher)):
        process.send_signal(signal.SIGTERM)
    output = run.end(launcher)
    assert launcher.returncode == 1, output  # the launcher's own, whatever the script's was
    run.assert_saved_and_stopped(output)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_run_within_a_minute(run, killed):
    run.log_before = run._log()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher = subprocess.Popen(
        [*command, str(ROOT / "train_accelerate.py"), *run.script.flags(run.folder, **run.fields)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    run.wait(launcher, lambda: run.step() and run.saved())
    ranks = ranks_of(launcher)
    ranks[killed].kill()
    output = run.end(launcher)
    assert launcher.returncode == 1, output
    assert not any(rank.is_running() for rank in ranks)
    assert "another process ended first" in output
    assert "[rank" not in output  # no traceback of the one that was left


def test_after_all_stops_the_run_ends_with_the_bits_of_the_unbroken_one(run, unbroken):
    assert 0 < max(train_rows(run.folder)) < FIELDS["max_steps"]
    assert "resumed from" in run.script(run.folder, **run.fields)
    assert_same_bits(run.folder, unbroken)


def test_a_second_signal_ends_a_long_step_at_once(train_script, tmp_path):
    long_step = Stopped(train_script, tmp_path / "run", global_batch_tokens=256 * 20_000, eval_every=0)
    process = long_step.start()
    long_step.wait(process, (long_step.folder / "metrics.jsonl").exists)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(2.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    assert process.returncode == -signal.SIGTERM
    assert long_step.saved() == 0


@pytest.mark.slow
def test_a_signal_while_the_first_step_compiles_saves_that_step_and_the_run_goes_on_bit_exactly(
    train_script, tmp_path
):
    fields = {"compile": "true", "max_steps": 8, "eval_every": 0}
    train_script(tmp_path / "unbroken", **fields)
    compiled = Stopped(train_script, tmp_path / "run", **fields)
    process = compiled.start()
    compiled.wait(process, (compiled.folder / "metrics.jsonl").exists)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert compiled.step() == 0
    output = compiled.end(process)
    assert process.returncode == 75, output
    assert list(train_rows(compiled.folder)) == [1] and compiled.saved() == 1
    train_script(compiled.folder, **{**FIELDS, **fields})
    assert_same_bits(compiled.folder, tmp_path / "unbroken")
