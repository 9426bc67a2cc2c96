"""A run outlives its terminal and its trackers, and stops with its launcher."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from gpt2repro.run.metrics import MetricsLog, read_metrics
from tests.conftest import ENVIRONMENT, SCRIPT, end, kill, train_rows, wait_until


class FailingTracker:
    name = "failing"

    def __init__(self) -> None:
        self.asked = 0

    def log(self, values, step):
        self.asked += 1
        raise ConnectionError("no network")

    def finish(self):
        raise ConnectionError("no network")


def test_a_tracker_that_fails_is_left_out_and_named_once(tmp_path, capsys):
    tracker = FailingTracker()
    log = MetricsLog(tmp_path / "metrics.jsonl", trackers=[tracker])
    for step in (1, 2, 3):
        log.write(step, "train", loss=1.0)
    log.close()
    assert tracker.asked == 1
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert capsys.readouterr().out.count("tracker failing failed (no network): the run continues without it") == 1


def test_a_run_whose_output_nobody_reads_trains_to_its_end(train_script, unbroken_run, tmp_path):
    command = [sys.executable, str(SCRIPT), *train_script.flags(tmp_path / "run")]
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, timeout=600)
    os.close(writer)
    assert done.returncode == 0, done.stderr
    found, expected = train_rows(tmp_path / "run"), train_rows(unbroken_run)
    assert {step: row["loss"] for step, row in found.items()} == {step: row["loss"] for step, row in expected.items()}


def test_a_text_that_the_terminal_cannot_show_ends_no_run(train_script, tmp_path):
    output = train_script(
        tmp_path / "run", max_steps=3, sample_every=3, sample_prompt="東京 🙂", sample_tokens=2,
        env={"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert r"sample: \u6771\u4eac" in output


@pytest.mark.parametrize("name", ["SIGHUP", "SIGQUIT", "SIGXCPU"])
def test_every_signal_that_ends_a_process_saves_the_step_first(train_script, tmp_path, name):
    process = train_script.start_paused(tmp_path / "run", "step 5")
    process.send_signal(getattr(signal, name))
    train_script.proceed(tmp_path / "run")
    output = end(process)
    assert process.returncode == 75, output
    assert (tmp_path / "run" / "latest").resolve().name == "step-00000005"


def test_a_run_whose_launcher_was_killed_alone_saves_and_ends(train_script, tmp_path):
    run_dir = tmp_path / "run"
    process = train_script.start_paused(run_dir, "step 5", processes=2)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "python" in child.name()]
    process.kill()
    wait_until(lambda: process.poll() is not None, process)
    train_script.proceed(run_dir)
    deadline = time.monotonic() + 300
    while any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks):
        if time.monotonic() > deadline:
            kill(process)
            pytest.fail("the ranks train on without their launcher")
        time.sleep(0.1)
    assert (run_dir / "latest").resolve().name < "step-00000008"


def test_an_evaluation_that_fails_loses_no_step_and_is_made_up_for_on_resume(train_script, unbroken_run, tmp_path):
    run_dir, broken = tmp_path / "run", tmp_path / "broken.py"
    broken.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import train_accelerate\n"
        "from gpt2repro.eval import in_training\n"
        "measure, calls = in_training.validation_loss, []\n"
        "def fail_the_second_time(*arguments, **options):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2:\n"
        "        raise ValueError('the validation cannot be read')\n"
        "    return measure(*arguments, **options)\n"
        "in_training.validation_loss = fail_the_second_time\n"
        "sys.exit(train_accelerate.main())\n"
    )
    output = train_script(run_dir, script=broken, save_every=4, exit_code=1)
    assert "error: the validation cannot be read" in output
    assert (run_dir / "latest").resolve().name == "step-00000004"
    train_script(run_dir, save_every=4)
    for kind in ("train", "val"):
        found, expected = train_rows(run_dir, kind), train_rows(unbroken_run, kind)
        assert {step: row["loss"] for step, row in found.items()} == {s: row["loss"] for s, row in expected.items()}
