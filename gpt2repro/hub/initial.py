"""The network that a run starts from: new from the recipe's seed, or with the weights of a checkpoint."""

import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.command import say
from gpt2repro.hub.convert import config_of, load_as_gpt2repro, set_end_of_text
from gpt2repro.recipe import Recipe
from modeling_gpt2repro import GPT2ReproForCausalLM

SIZES = ("n_layer", "n_head", "n_embd", "n_positions")


def take_shape(recipe: Recipe, *, world_size: int = 1) -> Recipe:
    """The recipe with the sizes of the checkpoint that starts the run, where its model is `init_from`.

    Raises:
        ValueError: the checkpoint cannot be read, or the recipe does not fit it.
    """
    if recipe.model != "init_from":
        return recipe
    config = config_of(str(recipe.init_from))
    recipe = replace(recipe, **{name: getattr(config, name) for name in SIZES})
    recipe.check(world_size=world_size)
    if not int(os.environ.get("RANK", 0)):
        sizes = ", ".join(f"{name} {getattr(recipe, name)}" for name in SIZES)
        say(f"the shape is that of {recipe.init_from}: {sizes}")
    return recipe


def initial_model(recipe: Recipe, *, vocab_size: int, eot_id: int, verify: bool = True) -> GPT2ReproForCausalLM:
    """The model of a recipe, on the CPU. `verify`: of several processes one is enough to compare hashes.

    Raises:
        ValueError: `init_from` cannot be loaded, or does not fit the recipe.
    """
    config = GPT2ReproConfig(**recipe.shape(), vocab_size=vocab_size, bos_token_id=eot_id, eos_token_id=eot_id)
    torch.manual_seed(recipe.seed)
    if recipe.init_from:
        model = load_as_gpt2repro(recipe.init_from, vocab_size=vocab_size, verify=verify)
        check_fit(model, config, init_from=recipe.init_from)
        set_end_of_text(model, eot_id)
    else:
        model = GPT2ReproForCausalLM(config)
    set_dropout(model, recipe.dropout)
    model.set_attn_implementation(recipe.attn_implementation)
    if recipe.gradient_checkpointing:
        recompute_activations(model)
    return model


def check_fit(model: GPT2ReproForCausalLM, wanted: GPT2ReproConfig, *, init_from: str) -> None:
    """Refuse a model that has other sizes than `wanted`, or an untied head, which no run trains."""
    there = model.config
    differing = [name for name in (*SIZES, "vocab_size") if getattr(there, name) != getattr(wanted, name)]
    if differing:
        sizes = [f"{name} is {getattr(there, name)} there, {getattr(wanted, name)} here" for name in differing]
        advice = "leave the sizes out and give --model init_from to take the checkpoint's"
        advice = "give the tokenizer that it was trained with" if differing == ["vocab_size"] else advice
        raise ValueError(f"init_from {init_from} is of another shape: {'; '.join(sizes)}; {advice}")
    if not there.tie_word_embeddings:
        raise ValueError(f"init_from {init_from} has a head of its own: expected it tied to the token embedding")


def set_dropout(model: GPT2ReproForCausalLM, p: float) -> None:
    """Give the whole model the dropout probability `p`, whatever its checkpoint had."""
    model.config.resid_pdrop = model.config.embd_pdrop = model.config.attn_pdrop = p
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


def recompute_activations(model: Any) -> None:
    """Turn gradient checkpointing on, by the name that this release of Transformers has for it."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
