"""Bad steps, the watchdog in a process that really hangs, and trackers."""

import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time

import pytest
from accelerate.tracking import get_available_trackers

import train_accelerate
from gpt2repro.recipe import TRACKERS, Recipe
from gpt2repro.train.safety import OUTLIER_WINDOW, BadSteps
from tests.conftest import ROOT, train_rows


def history(steps: int, *, seed: int = 0, first: int = 1) -> list[dict]:
    """Rows of metrics.jsonl of `steps` good steps."""
    draw = random.Random(seed)
    return [{"step": step, "kind": "train", "loss": 3 + draw.gauss(0, 0.02), "grad_norm": 0.4 + draw.gauss(0, 0.01)}
            for step in range(first, first + steps)]  # fmt: skip


def bad(step: int, loss: float | None = None) -> list[dict]:
    """The two rows of a bad step, in the order in which a run writes them."""
    return [{"step": step, "kind": "bad_step", "reason": "…"},
            {"step": step, "kind": "train", "loss": loss, "grad_norm": 0.4}]  # fmt: skip


def test_a_loss_or_gradient_far_above_the_last_128_steps_is_bad():
    rows = history(200)
    for spike, name in (({"loss": 3.2}, "loss"), ({"grad_norm": 0.6}, "grad_norm")):
        rule = BadSteps(Recipe(outlier_z=5.0), rows)
        row = rows[-1] | spike
        window = [r[name] for r in rows[-OUTLIER_WINDOW + 1 :]] + [row[name]]
        z = (row[name] - statistics.fmean(window)) / statistics.pstdev(window)
        assert z > 5
        reason = rule.reason(201, row["loss"], row["grad_norm"])
        assert reason is not None and f"{z:.1f}" in reason and "standard deviations" in reason
        assert rule.reason(202, rows[-1]["loss"], rows[-1]["grad_norm"]) is None


def test_no_step_is_an_outlier_when_the_rule_is_off_or_the_window_not_full():
    assert BadSteps(Recipe(), history(200)).reason(201, 9.0, 9.0) is None
    assert BadSteps(Recipe(outlier_z=5.0), history(OUTLIER_WINDOW - 2)).reason(127, 9.0, 9.0) is None


def test_a_resumed_run_judges_as_the_unbroken_one():
    rows = [*history(160), bad(161)[1], *history(60, seed=1, first=162)]
    unbroken = BadSteps(Recipe(outlier_z=2.0, max_bad_steps=100))
    judged = [unbroken.reason(step, r["loss"] or math.nan, r["grad_norm"]) for step, r in enumerate(rows, start=1)]
    resumed = BadSteps(Recipe(outlier_z=2.0, max_bad_steps=100), rows[:200])
    assert judged[200:] == [resumed.reason(s, r["loss"], r["grad_norm"]) for s, r in enumerate(rows[200:], start=201)]
    assert any(judged[200:]) and not all(judged[200:])


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (3.0, math.inf), (3.0, math.nan), (3.0, 0.0)])
def test_a_loss_or_norm_that_is_not_finite_and_a_norm_of_zero_are_bad(loss, grad_norm):
    assert BadSteps(Recipe()).reason(1, loss, grad_norm) == f"loss {loss}, gradient norm {grad_norm}"


def test_bad_steps_before_a_resume_count_for_max_bad_steps():
    recipe = Recipe(max_bad_steps=3)
    two_at_the_end = [*bad(1), *history(5, first=2), *bad(7), {"step": 7, "kind": "checkpoint"}, *bad(8)]
    rule = BadSteps(recipe, two_at_the_end)
    assert rule.reason(9, math.nan, 1.0)
    with pytest.raises(ValueError, match="4 in a row are more than max_bad_steps=3"):
        rule.reason(10, math.nan, 1.0)
    rule = BadSteps(recipe, [*two_at_the_end, *history(1, first=9)])  # a good step ended them
    assert all(rule.reason(step, math.nan, 1.0) for step in (10, 11, 12))


def test_on_bad_step_stop_ends_the_run_at_the_first():
    with pytest.raises(ValueError, match=r"step 7 is bad: loss nan.*on_bad_step is stop"):
        BadSteps(Recipe(on_bad_step="stop")).reason(7, math.nan, 1.0)


def test_the_watchdog_names_where_a_process_hangs_and_ends_it():
    code = (
        "import threading\n"
        "from gpt2repro.train.safety import Watchdog\n"
        "watchdog = Watchdog(0.02, rank=3)\n"
        "watchdog.step = 11\n"
        "def wait_for_ever():\n"
        "    threading.Event().wait()\n"
        "wait_for_ever()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "error on process 3: no progress for 0.02 minutes, in step 12, at:" in done.stderr
    assert "wait_for_ever" in done.stderr


def test_the_watchdog_does_not_end_a_process_that_makes_progress():
    code = (
        "import os, signal, threading, time\n"
        "from gpt2repro.train.safety import Watchdog\n"
        "watchdog = Watchdog(0.03, rank=0)\n"  # 1.8 seconds, which no busy machine keeps a thread waiting
        "for watchdog.step in range(25):\n"
        "    time.sleep(0.1)\n"  # the same place all the time, in another step
        "end = time.monotonic() + 2.5\n"
        "while time.monotonic() < end:\n"  # the same step all the time, in another place
        "    sum(range(50_000))\n"
        "    sorted(range(50_000))\n"
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGSTOP)).start()\n"
        "for _ in range(2):\n"  # the same step and place, most of the time suspended
        "    time.sleep(0.5)\n"
        "(thread,) = [thread for thread in threading.enumerate() if thread.name == 'watchdog']\n"
        "watchdog.stop()\n"
        "thread.join()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    os.waitpid(process.pid, os.WUNTRACED)  # it has stopped itself
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    _, printed = process.communicate(timeout=600)
    assert (process.returncode, printed) == (0, "")


def test_a_rank_that_hangs_ends_the_run_and_both_say_where_they_are(train_script, unbroken_run, tmp_path):
    run_dir = tmp_path / "run"
    hanging = tmp_path / "hanging.py"  # the script, in which process 1 falls asleep while it reads step 5
    hanging.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train_accelerate\n"
        "from gpt2repro.train import schedule\n"
        "def lr_at(step, recipe):\n"
        "    if step == 4 and os.environ['RANK'] == '1':\n"
        "        time.sleep(1000)\n"
        "    return schedule.lr_at(step, recipe)\n"
        "train_accelerate.lr_at = lr_at\n"
        "sys.exit(train_accelerate.main())\n"
    )
    # Three seconds lie between what a process says and its end: room for the other one to say it too.
    output = train_script(run_dir, processes=2, script=hanging, watchdog_minutes=0.25, exit_code=1)
    assert "error on process 1: no progress for 0.25 minutes, in step 5" in output
    assert "hanging.py:7 lr_at" in output
    assert "error on process 0: no progress" in output
    assert "run_backward" in output  # process 0 waits for the gradients of process 1
    train_script(run_dir, processes=2)
    found, expected = train_rows(run_dir), train_rows(unbroken_run)
    assert {s: row["loss"] for s, row in found.items()} == {s: row["loss"] for s, row in expected.items()}


def test_a_tracker_gets_the_numbers_of_the_record(train_script, tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_dir = tmp_path / "run"
    train_script(run_dir, log_with="tensorboard", max_steps=3)
    events = reading.EventAccumulator(str(run_dir / "gpt2repro")).Reload()
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    assert logged == pytest.approx({step: row["loss"] for step, row in train_rows(run_dir).items()})
    assert {event.step for event in events.Scalars("val/loss")} == {0, 3}


def test_a_tracker_that_is_not_installed_is_an_error(train_script, tmp_path, capsys):
    missing = sorted(set(TRACKERS) - set(map(str, get_available_trackers())))
    if not missing:
        pytest.skip("every tracker is installed")
    assert train_accelerate.main(train_script.flags(tmp_path / "run", log_with=missing[0])) == 1
    error = capsys.readouterr().err
    assert f"error: log_with is {missing[0]}, which is not installed: pip install {missing[0]}" in error
    assert not (tmp_path / "run").exists()
