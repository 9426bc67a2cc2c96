"""A recipe against what it meets: the shapes that there are, the dataset, the weights that it starts from."""

import shlex
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from configuration_gpt2repro import NAMED_SHAPES, GPT2ReproConfig
from gpt2repro.data.shards import Dataset, tokenizer_sha256
from gpt2repro.data.sources import was_made_from
from gpt2repro.hub.convert import load_as_gpt2repro
from gpt2repro.training.arguments import Recipe
from modeling_gpt2repro import GPT2ReproForCausalLM


def model_shape(recipe: Recipe) -> dict[str, Any] | None:
    """The named shape with the recipe's overrides; None when the name is unknown."""
    if recipe.model not in NAMED_SHAPES:
        return None
    overrides = {name: getattr(recipe, name) for name in ("n_layer", "n_head", "n_embd", "n_positions")}
    shape = {"n_positions": 1024, **NAMED_SHAPES[recipe.model]}
    return shape | {name: value for name, value in overrides.items() if value is not None}


def check_recipe(recipe: Recipe, *, world_size: int) -> None:
    """Name everything that is wrong with a recipe at once, before anything is loaded or written."""
    shape = model_shape(recipe)
    problems = recipe.problems(shape, world_size=world_size)
    try:
        GPT2ReproConfig(**(shape or {}))
    except StrictDataclassError as error:
        problems += str(error).split("ValueError: ")[-1].splitlines()
    if problems:
        raise ValueError("\n".join(problems))


def model_config(recipe: Recipe, dataset: Dataset) -> GPT2ReproConfig:
    """The configuration of a run's model: the recipe's shape, the dataset's vocabulary."""
    vocab_size = recipe.vocab_size or dataset.vocab_size
    if vocab_size < dataset.vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is smaller than the {dataset.vocab_size} entries of the dataset's tokenizer: "
            "leave vocab_size out"
        )
    return GPT2ReproConfig(
        **(model_shape(recipe) or {}), vocab_size=vocab_size, bos_token_id=dataset.eot_id, eos_token_id=dataset.eot_id,
        resid_pdrop=recipe.dropout, embd_pdrop=recipe.dropout, attn_pdrop=recipe.dropout,
    )  # fmt: skip


def check_dataset(recipe: Recipe, dataset: Dataset) -> None:
    """Refuse a dataset that was made from another source or with another tokenizer than the recipe's.

    A tokenizer of the Hub is compared as far as it can be without a network: a trained one is never one of those.
    """
    folder, wanted = recipe.dataset_dir[0], recipe.tokenizer or ""
    advice = "give another dataset_dir to prepare, or leave it out of the recipe"
    made_from, made_with = dataset.info.get("source"), str(dataset.info.get("tokenizer", ""))
    if recipe.source and made_from and not was_made_from(made_from, recipe.source, list(recipe.files)):
        files = f" {', '.join(recipe.files)}" if recipe.files else ""
        raise ValueError(f"source is {recipe.source}{files}, but {folder} was made from {made_from}: {advice}")
    if Path(wanted).is_dir() and wanted:
        same = tokenizer_sha256(wanted) == dataset.tokenizer_sha256
    else:
        same = not wanted or wanted == made_with or "train:" not in wanted + made_with
    if not same:
        raise ValueError(f"tokenizer is {wanted}, but {folder} has another one ({made_with or 'named'}): {advice}")


def preparation_command(recipe: Recipe) -> str:
    """What makes the recipe's dataset, to be typed into a shell."""
    words = ["python", "-m", "gpt2repro.data.prepare", "--source", str(recipe.source)]
    words += ["--files", *recipe.files] if recipe.files else []
    words += ["--val-tokens", str(recipe.val_tokens)] if recipe.val_tokens else []
    return shlex.join([*words, "--tokenizer", str(recipe.tokenizer), "--out", recipe.dataset_dir[0]])


def initial_model(recipe: Recipe, config: GPT2ReproConfig) -> GPT2ReproForCausalLM:
    """The network that a run begins with, fresh from the recipe's seed or with the weights of `init_from`.

    Raises:
        ValueError: weights that cannot be loaded, or are of another shape.
    """
    torch.manual_seed(recipe.seed)
    if recipe.init_from:
        model = load_as_gpt2repro(recipe.init_from, vocab_size=config.vocab_size)
        check_init_from(recipe, model, config)
    else:
        model = GPT2ReproForCausalLM(config)
    model.set_attn_implementation(recipe.attn_implementation)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def check_init_from(recipe: Recipe, model: GPT2ReproForCausalLM, wanted: GPT2ReproConfig) -> None:
    """Refuse weights of another shape than the recipe's, and give the model the recipe's dropout."""
    found = model.config
    names = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    wrong = [f"{n} is {getattr(found, n)} there, {getattr(wanted, n)} here" for n in names
             if getattr(found, n) != getattr(wanted, n)]  # fmt: skip
    if wrong:
        raise ValueError(f"init_from {recipe.init_from} is of another shape: {'; '.join(wrong)}")
    found.resid_pdrop = found.embd_pdrop = found.attn_pdrop = recipe.dropout
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # made with the checkpoint's
            module.p = recipe.dropout
