"""Every recipe and launcher configuration that the project ships can be used as it is."""

import pytest
import yaml

from gpt2repro.cli import parse_recipe
from tests.conftest import ROOT
from gpt2repro.checks import model_shape
from train_accelerate import DEFAULT_RECIPE

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_no_problem(path):
    recipe = parse_recipe(["--recipe", str(path)], default=DEFAULT_RECIPE)
    for world_size in (1, 8) if recipe.model == "gpt2" else (1,):
        assert recipe.problems(model_shape(recipe), world_size=world_size) == []


def test_the_reproduction_is_the_gpt3_papers_hyperparameters():
    recipe = parse_recipe(["--recipe", str(ROOT / "recipes" / "gpt2-124m-10b.yaml")], default=DEFAULT_RECIPE)
    assert recipe.max_steps * recipe.global_batch_tokens == 9_999_745_024
    assert (recipe.learning_rate, recipe.beta1, recipe.beta2, recipe.weight_decay) == (6e-4, 0.9, 0.95, 0.1)
    assert recipe.warmup_steps == 375_000_000 // recipe.global_batch_tokens
    assert (recipe.grad_clip, recipe.min_lr_ratio, recipe.schedule) == (1.0, 0.1, "cosine")


def test_the_command_line_overrides_a_recipe_and_numbers_may_be_written_as_people_do():
    argv = ["--recipe", str(ROOT / "recipes" / "demo.yaml"), "--learning-rate=6e-4", "--max_steps", "1_000",
            "--files", "a.txt", "b.txt", "--shuffle", "false"]  # fmt: skip
    recipe = parse_recipe(argv, default=DEFAULT_RECIPE)
    assert (recipe.learning_rate, recipe.max_steps, recipe.shuffle) == (6e-4, 1000, False)
    assert recipe.files == ("a.txt", "b.txt")
    assert recipe.model == "demo"


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_a_launcher_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
