"""A recipe against the weights that it starts from; what is refused is in test_bad_input.py."""

from dataclasses import replace

from torch import nn

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.checks import check_init_from
from gpt2repro.recipe import Recipe
from modeling_gpt2repro import GPT2ReproForCausalLM


def test_weights_that_start_a_run_drop_out_as_the_recipe_says_and_not_as_their_checkpoint_did():
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 32}
    config = GPT2ReproConfig(**shape, bos_token_id=0, eos_token_id=0, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    model = GPT2ReproForCausalLM(config)
    for dropout in (0.0, 0.3):
        check_init_from(replace(Recipe(), dropout=dropout), model, config)
        assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {dropout}
        assert {model.config.resid_pdrop, model.config.embd_pdrop, model.config.attn_pdrop} == {dropout}
