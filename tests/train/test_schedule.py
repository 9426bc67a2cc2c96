"""The learning rate against the schedules that Transformers ships, and against their formulas."""

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from gpt2repro.recipe import Recipe
from gpt2repro.train.schedule import lr_at


def rates_of(scheduler, **settings) -> list[float]:
    """The learning rates of steps 0 to 400 of one of the library's schedules, from a peak of 6e-4."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=6e-4)
    reference = scheduler(optimizer, **settings)
    rates = []
    for _ in range(401):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    return rates


def test_after_the_warmup_the_cosine_is_the_librarys_at_every_step():
    recipe = Recipe(max_steps=400, warmup_steps=20, learning_rate=6e-4, min_lr_ratio=0.1)
    expected = rates_of(
        get_cosine_with_min_lr_schedule_with_warmup, num_warmup_steps=20, num_training_steps=400, min_lr_rate=0.1
    )
    assert [lr_at(step, recipe) for step in range(20, 401)] == pytest.approx(expected[20:], rel=1e-9)


@pytest.mark.parametrize(("schedule", "decay_type"), [("wsd_linear", "linear"), ("wsd_sqrt", "1-sqrt")])
def test_after_the_warmup_warmup_stable_decay_is_the_librarys_at_every_step(schedule, decay_type):
    recipe = Recipe(
        max_steps=400, warmup_steps=20, learning_rate=6e-4, min_lr_ratio=0.1, schedule=schedule, decay_ratio=0.25
    )
    expected = rates_of(
        get_wsd_schedule, num_warmup_steps=20, num_training_steps=400, num_decay_steps=100, decay_type=decay_type,
        min_lr_ratio=0.1,
    )  # fmt: skip
    assert [lr_at(step, recipe) for step in range(20, 401)] == pytest.approx(expected[20:], rel=1e-9)


@pytest.mark.parametrize(
    ("schedule", "halfway"), [("wsd_linear", 0.5), ("wsd_sqrt", 1 - 0.5**0.5), ("wsd_concave", 0.75)]
)
def test_warmup_stable_decay_holds_the_peak_and_then_falls_by_its_formula(schedule, halfway):
    recipe = Recipe(max_steps=1000, warmup_steps=10, learning_rate=1.0, min_lr_ratio=0.0, schedule=schedule)
    assert {lr_at(step, recipe) for step in range(10, 801)} == {1.0}
    assert lr_at(801, recipe) < 1.0
    assert lr_at(900, recipe) == pytest.approx(halfway)
    assert lr_at(1000, recipe) == lr_at(1200, recipe) == 0.0


def test_the_warmup_is_linear_from_its_first_step_and_ends_at_the_peak():
    recipe = Recipe()  # the reproduction: 715 steps to 6e-4
    assert lr_at(0, recipe) == pytest.approx(6e-4 / 715)
    assert lr_at(356, recipe) == pytest.approx(6e-4 * 357 / 715)
    assert lr_at(714, recipe) == 6e-4
    assert lr_at(715, recipe) == pytest.approx(6e-4)
    assert lr_at(recipe.max_steps, recipe) == pytest.approx(6e-5)


def test_constant_stays_at_the_peak():
    recipe = Recipe(schedule="constant", warmup_steps=0)
    assert {lr_at(step, recipe) for step in (0, 1, 19_072)} == {6e-4}


def test_a_decay_that_overlaps_the_warmup_is_refused():
    recipe = Recipe(schedule="wsd_sqrt", max_steps=100, warmup_steps=30, decay_ratio=0.8)
    problem = r"^warmup_steps=30 and a decay over decay_ratio=0\.8 of max_steps=100 overlap: "
    with pytest.raises(ValueError, match=problem):
        recipe.check()
