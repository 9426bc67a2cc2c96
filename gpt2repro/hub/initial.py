"""The network that a run starts from: new from the recipe's seed, or with the weights of a checkpoint."""

from typing import Any

import torch
from torch import nn

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.hub.convert import load_as_gpt2repro, set_end_of_text
from gpt2repro.recipe import Recipe
from modeling_gpt2repro import GPT2ReproForCausalLM


def initial_model(recipe: Recipe, *, vocab_size: int, eot_id: int) -> GPT2ReproForCausalLM:
    """The model of a recipe, on the CPU.

    Raises:
        ValueError: `init_from` cannot be loaded, or does not fit the recipe.
    """
    config = GPT2ReproConfig(**recipe.shape(), vocab_size=vocab_size, bos_token_id=eot_id, eos_token_id=eot_id)
    torch.manual_seed(recipe.seed)
    if recipe.init_from:
        model = load_as_gpt2repro(recipe.init_from, vocab_size=vocab_size)
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
    names = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    differing = [name for name in names if getattr(there, name) != getattr(wanted, name)]
    if differing:
        sizes = [f"{name} is {getattr(there, name)} there, {getattr(wanted, name)} here" for name in differing]
        raise ValueError(f"init_from {init_from} is of another shape: {'; '.join(sizes)}")
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
