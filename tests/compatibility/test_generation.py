"""`generate` beside stock GPT-2 with the same weights (greedy, static cache and left padding: tests/test_model.py)."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2repro.hub.convert import from_stock
from modeling_gpt2repro import CACHE
from tests.compatibility.conftest import SHAPE


def generate(model, ids, **settings):
    torch.manual_seed(3)
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "top_k": 20, "temperature": 0.8},
        {"do_sample": True, "top_p": 0.9, "num_return_sequences": 3, "repetition_penalty": 1.2},
        {"do_sample": False, "num_beams": 4},
        {"do_sample": True, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    ],
    ids=["top-k", "top-p", "beams", "sampled beams"],
)
def test_sampling_and_beams_draw_the_tokens_of_stock_gpt2(pair, ids, settings):
    stock, ours = pair
    assert torch.equal(generate(ours, ids, **settings), generate(stock, ids, **settings))


def test_assisted_generation_writes_the_greedy_text(pair, ids):
    stock, ours = pair
    torch.manual_seed(5)
    assistant = from_stock(GPT2LMHeadModel(GPT2Config(**SHAPE | {"n_layer": 1}, bos_token_id=0, eos_token_id=None)))
    prompt = ids[:1]
    assert torch.equal(
        generate(ours, prompt, do_sample=False, assistant_model=assistant), generate(stock, prompt, do_sample=False)
    )
    assert torch.equal(
        generate(ours, prompt, do_sample=False, prompt_lookup_num_tokens=3), generate(stock, prompt, do_sample=False)
    )


def test_generation_goes_on_from_a_cache_and_starts_from_embeddings(pair, ids):
    stock, ours = pair
    expected = generate(stock, ids, do_sample=False)
    settings = {"do_sample": False, "return_dict_in_generate": True}
    begun = ours.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, **settings)
    mask = torch.ones_like(begun.sequences)
    ended = ours.generate(begun.sequences, attention_mask=mask, max_new_tokens=11, **{CACHE: begun[CACHE]}, **settings)
    assert torch.equal(ended.sequences, expected)
    embedded = ours.generate(inputs_embeds=ours.get_input_embeddings()(ids), max_new_tokens=16, **settings)
    assert torch.equal(embedded.sequences, expected[:, ids.shape[1] :])


def test_scores_hidden_states_and_attentions_of_a_generation_are_those_of_stock_gpt2(pair, ours, ids):
    outputs = []
    for model in (copy.deepcopy(pair[0]), ours):
        model.set_attn_implementation("eager")  # the one that has attention weights to show
        outputs.append(
            generate(
                model, ids, do_sample=False, return_dict_in_generate=True, output_scores=True, output_logits=True,
                output_hidden_states=True, output_attentions=True,
            )
        )  # fmt: skip
    stock, own = outputs
    for field in ("sequences", "scores", "logits", "hidden_states", "attentions"):
        torch.testing.assert_close(own[field], stock[field], atol=2e-5, rtol=1e-5)


def test_a_model_compiled_in_place_still_generates(pair, ours, ids):
    ours.compile(backend="aot_eager", dynamic=True)
    assert torch.equal(generate(ours, ids, do_sample=False), generate(pair[0], ids, do_sample=False))
