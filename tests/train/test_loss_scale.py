"""fp16 on a CPU: the loss scale falls and grows, is saved and resumed, and an overflow is no bad step."""

import json
import math

import pytest

from gpt2repro.recipe import Recipe
from gpt2repro.train.safety import MAX_OVERFLOWS, BadSteps
from tests.conftest import PAUSING_SCRIPT, end, kill, train_rows
from tests.test_train import assert_same_bits


def saved_scale(run_dir) -> dict:
    return json.loads((run_dir / "latest" / "trainer_state.json").read_text())["loss_scale"]


def test_a_killed_run_resumes_its_loss_scale_bit_exactly(train_script, tmp_path, monkeypatch):
    # High enough to overflow at once, and then to grow into an overflow again after every second good step.
    monkeypatch.setenv("LOSS_SCALE", str(2.0**25))
    monkeypatch.setenv("PAUSE_AT", str(tmp_path / "nowhere"))
    unbroken, run_dir = tmp_path / "unbroken", tmp_path / "run"
    train_script(unbroken, script=PAUSING_SCRIPT, mixed_precision="fp16")
    process = train_script.start_paused(run_dir, "step 5", mixed_precision="fp16")
    kill(process)
    end(process)
    assert "resumed from" in train_script(run_dir, script=PAUSING_SCRIPT, mixed_precision="fp16")
    assert_same_bits(run_dir, unbroken)
    overflows = train_rows(unbroken, "overflow")
    assert min(overflows) == 1 and max(overflows) > 3  # before and after the checkpoint of step 3
    assert train_rows(run_dir, "overflow") == overflows
    assert saved_scale(run_dir) == saved_scale(unbroken)
    assert not train_rows(unbroken, "bad_step")


def test_fp16_stays_close_to_fp32(unbroken_run, train_script, tmp_path):
    assert "fp16 mixed precision" in train_script(tmp_path / "run", mixed_precision="fp16")
    full, half = train_rows(unbroken_run), train_rows(tmp_path / "run")
    assert full.keys() == half.keys()
    assert [half[step]["loss"] for step in half] == pytest.approx([full[step]["loss"] for step in full], abs=2e-3)
    assert [half[step]["loss"] for step in half] != [full[step]["loss"] for step in full]


def test_an_overflow_counts_as_no_bad_step_and_twenty_in_a_row_are_one_error():
    rule = BadSteps(Recipe(on_bad_step="stop"))
    for step in range(1, MAX_OVERFLOWS):
        assert rule.overflowed(step, 4.0, math.inf)
    assert not rule.overflowed(20, 4.0, 1.0)
    for step in range(21, 20 + MAX_OVERFLOWS):
        assert rule.overflowed(step, 4.0, math.nan)
    with pytest.raises(ValueError, match=r"20 steps in a row, up to step 40, overflow fp16.*--mixed_precision no"):
        rule.overflowed(40, 4.0, math.inf)


def test_a_loss_that_is_not_finite_is_a_bad_step_and_no_overflow():
    rule = BadSteps(Recipe())
    assert not rule.overflowed(1, math.nan, math.nan)
    assert "loss nan" in rule.reason(1, math.nan, math.nan)
