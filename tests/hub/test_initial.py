"""The model that a run starts from; sizes that do not fit the recipe are refused in test_bad_input.py."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.hub.initial import initial_model, take_shape
from gpt2repro.recipe import Recipe
from modeling_gpt2repro import GPT2ReproForCausalLM

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16}
RECIPE = replace(Recipe(), **SHAPE)


def save(folder, **settings):
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**SHAPE, vocab_size=32, bos_token_id=0, eos_token_id=0, **settings))
    model.save_pretrained(folder)
    return model


def test_weights_that_start_a_run_get_the_dropout_and_end_of_text_of_the_recipe(tmp_path):
    saved = save(tmp_path, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    for dropout in (0.0, 0.3):
        recipe = replace(RECIPE, dropout=dropout, init_from=str(tmp_path))
        model = initial_model(recipe, vocab_size=32, eot_id=7)
        assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {dropout}
        assert {model.config.resid_pdrop, model.config.embd_pdrop, model.config.attn_pdrop} == {dropout}
        assert model.config.eos_token_id == model.generation_config.eos_token_id == 7
        assert torch.equal(model.lm_head.weight, saved.lm_head.weight)


def test_a_model_without_weights_to_start_from_is_that_of_the_seed(tmp_path):
    models = [initial_model(replace(RECIPE, seed=seed), vocab_size=32, eot_id=0) for seed in (1, 1, 2)]
    first, same, other = (model.lm_head.weight for model in models)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_a_run_does_not_start_from_an_untied_head(tmp_path):
    save(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="has a head of its own: expected it tied to the token embedding"):
        initial_model(replace(RECIPE, init_from=str(tmp_path)), vocab_size=32, eot_id=0)


def test_a_run_takes_the_shape_of_its_checkpoint_and_says_so(tmp_path, capsys):
    save(tmp_path)
    recipe = Recipe(model="init_from", init_from=str(tmp_path), seq_len=16)
    shaped = take_shape(recipe)
    assert {name: getattr(shaped, name) for name in SHAPE} == SHAPE
    assert "n_layer 1, n_head 2, n_embd 8, n_positions 16" in capsys.readouterr().out
    assert initial_model(shaped, vocab_size=32, eot_id=0).config.n_embd == 8
    with pytest.raises(ValueError, match="seq_len=1024 is longer than the model's n_positions=16"):
        take_shape(replace(recipe, seq_len=1024))
    for other, advice in ({"n_embd": 16}, "give --model init_from"), ({}, "give the tokenizer"):
        with pytest.raises(ValueError, match=advice):
            wanted = replace(RECIPE, init_from=str(tmp_path), **other)
            initial_model(wanted, vocab_size=32 if other else 33, eot_id=0)
