"""The learning rate against the schedule that Transformers ships."""

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from gpt2repro.training.arguments import Recipe
from gpt2repro.training.schedule import lr_at


def test_after_the_warmup_the_cosine_is_the_librarys_at_every_step():
    recipe = Recipe(max_steps=400, warmup_steps=20, learning_rate=6e-4, min_lr_ratio=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=6e-4)
    reference = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 20, 400, min_lr_rate=0.1)
    for step in range(401):
        if step >= 20:
            assert lr_at(step, recipe) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()


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
