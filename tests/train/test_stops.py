"""Signals and lost ranks: all processes stop at the same step or at once, and the same command resumes bit-exactly.

The tests stop the same run one after another; the last one lets it end and compares it with an
uninterrupted run. Each test pauses the run at a place (see pausing_script.py) while it sends its signal.
"""

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

import train_accelerate
from gpt2repro.train.safety import ONE_STOP_SECONDS
from tests.conftest import TrainScript, end, train_rows, wait_until
from tests.test_train import assert_same_bits

FIELDS = {"max_steps": 44, "save_every": 10, "eval_every": 20}


class Stopped:
    """The run in `folder`: start it, and check how it ends."""

    def __init__(self, script: TrainScript, folder: Path) -> None:
        self.script, self.folder = script, folder

    def start(self, place: str | int, **settings) -> subprocess.Popen:
        """The run, paused at `place`; a number is a step."""
        place = f"step {place}" if isinstance(place, int) else place
        return self.script.start_paused(self.folder, place, **settings, **FIELDS)

    def saved(self) -> int:
        return max((int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*")), default=0)

    def assert_saved_and_stopped(self, process: subprocess.Popen, step: int, *, exit_code: int = 75) -> None:
        output = end(process)
        assert process.returncode == exit_code, output
        assert f"stopped by a signal after saving step {step}" in output
        assert not list(self.folder.glob(".step-*.tmp"))
        assert max(train_rows(self.folder)) == self.saved() == step


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


def test_a_second_start_while_a_run_trains_is_refused_and_changes_nothing(run, capsys):
    process = run.start(5)
    assert train_accelerate.main(run.script.flags(run.folder, **FIELDS)) == 1
    assert f"error: another process trains in {run.folder}: end it" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    run.assert_saved_and_stopped(process, 5)


def test_a_signal_during_the_imports_ends_the_process_at_once_and_leaves_nothing(train_script, tmp_path):
    process = train_script.start(tmp_path / "run")
    wait_until(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGTERM)
    end(process)
    assert process.returncode == -signal.SIGTERM
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR2])  # and SIGTERM, above
def test_a_signal_saves_and_ends_with_75(run, number):
    step = run.saved() + 3
    process = run.start(step)
    process.send_signal(number)
    run.assert_saved_and_stopped(process, step)


def test_a_signal_during_a_validation_saves_after_the_next_step(run):
    process = run.start("validation")
    due = max(train_rows(run.folder))
    assert due not in train_rows(run.folder, "val")
    process.send_signal(signal.SIGTERM)
    run.assert_saved_and_stopped(process, due + 1)
    assert due in train_rows(run.folder, "val")


def test_a_signal_during_a_save_saves_again_after_the_next_step(run):
    process = run.start("save")
    due = max(train_rows(run.folder))
    assert [path.name.split(".")[1] for path in run.folder.glob(".step-*")] == [f"step-{due:08}"]
    process.send_signal(signal.SIGTERM)
    run.assert_saved_and_stopped(process, due + 1)


@pytest.mark.parametrize(
    "signalled",
    [
        lambda launcher, ranks: [launcher],
        lambda launcher, ranks: ranks[1:],
        lambda launcher, ranks: [launcher, *ranks],  # as a scheduler does; the launcher then sends it to them again
    ],
    ids=["the launcher", "one rank", "all processes"],
)
def test_sigterm_to_some_of_two_processes_stops_both_at_one_step(run, signalled):
    step = run.saved() + 2
    launcher = run.start(step, processes=2)
    processes = signalled(launcher, ranks_of(launcher))
    for process in processes:
        process.send_signal(signal.SIGTERM)
    if launcher not in processes:  # it passes the signal to both
        run.script.proceed(run.folder)
    run.assert_saved_and_stopped(launcher, step, exit_code=1)  # the launcher's own, whatever the script's was


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_run_within_a_minute(run, killed):
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher = run.start(run.saved() + 2, processes=2, launcher=launch)
    ranks = ranks_of(launcher)
    ranks[killed].kill()
    run.script.proceed(run.folder)
    output = end(launcher, seconds=60)
    assert launcher.returncode == 1, output
    assert not psutil.wait_procs(ranks, timeout=10)[1]
    assert "another process ended first" in output
    assert "[rank" not in output  # no traceback of the one that was left


def test_after_all_stops_the_run_ends_bit_identical_to_an_uninterrupted_one(run, unbroken):
    assert 0 < max(train_rows(run.folder)) < FIELDS["max_steps"]
    assert "resumed from" in run.script(run.folder, **FIELDS)
    assert_same_bits(run.folder, unbroken)


def test_a_second_signal_ends_a_long_step_at_once(train_script, tmp_path):
    run_dir = tmp_path / "run"
    process = train_script.start_paused(run_dir, "step 1", global_batch_tokens=256 * 20_000, eval_every=0)
    train_script.proceed(run_dir)
    process.send_signal(signal.SIGTERM)
    time.sleep(ONE_STOP_SECONDS + 2)  # with room for a busy machine, which may deliver the first one late
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    end(process)
    assert process.returncode == -signal.SIGTERM
    assert not list(run_dir.glob("step-*"))


@pytest.mark.slow
def test_a_signal_while_the_first_step_compiles_saves_that_step_and_the_run_resumes_bit_exactly(
    train_script, tmp_path
):
    fields = {"compile": "true", "eval_every": 0}
    train_script(tmp_path / "unbroken", **fields)
    run_dir = tmp_path / "run"
    process = train_script.start_paused(run_dir, "step 1", **fields)
    train_script.proceed(run_dir)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert not (run_dir / "metrics.jsonl").read_text()
    output = end(process)
    assert process.returncode == 75, output
    assert [path.name for path in run_dir.glob("step-*")] == ["step-00000001"]
    assert list(train_rows(run_dir)) == [1]
    train_script(run_dir, **fields)
    assert_same_bits(run_dir, tmp_path / "unbroken")
