"""The ways in which the ecosystem loads and stores a checkpoint."""

import json

import pytest
import torch
from accelerate import infer_auto_device_map, init_empty_weights, load_checkpoint_and_dispatch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from configuration_gpt2repro import GPT2ReproConfig
from modeling_gpt2repro import GPT2ReproForCausalLM


def test_the_safetensors_file_says_pytorch_and_keeps_the_tied_head_once(checkpoint, pair):
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert set(file.keys()) == {name for name, _ in pair[1].named_parameters()}
    loaded = GPT2ReproForCausalLM.from_pretrained(checkpoint)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_checkpoint_in_shards_loads_the_same(pair, ids, tmp_path):
    pair[1].save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, pair[1](ids).logits)


def test_dtype_bfloat16_loads_every_tensor_in_bfloat16(checkpoint, pair, ids):
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    stock = pair[0]
    with torch.no_grad():
        expected = type(stock)(stock.config).to(torch.bfloat16).eval()
        expected.load_state_dict(stock.state_dict())
        torch.testing.assert_close(loaded(ids).logits, expected(ids).logits, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_every_attention_implementation_loads_by_name(checkpoint, pair, ids, implementation):
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation=implementation)
    assert loaded.config._attn_implementation == implementation
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        got, expected = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (loaded, pair[0]))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


def test_device_map_auto_generates_with_what_does_not_fit_on_disk(checkpoint, pair, ids, tmp_path):
    memory = {
        "cpu": 350_000,
        "disk": 10_000_000,
    }  # bytes; the embeddings take 50,000, a block 200,000 and room to work
    loaded = AutoModelForCausalLM.from_pretrained(
        checkpoint, device_map="auto", max_memory=memory, offload_folder=tmp_path
    )
    assert (loaded.hf_device_map["transformer.wte"], loaded.hf_device_map["transformer.h"]) == ("cpu", "disk")
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **settings), pair[0].generate(ids, **settings))


def test_big_model_loading_runs_from_blocks_on_disk(checkpoint, pair, ids, tmp_path):
    with init_empty_weights():
        model = GPT2ReproForCausalLM(GPT2ReproConfig.from_pretrained(checkpoint))
    model.tie_weights()
    placed = {"transformer.wte": "cpu", "lm_head": "cpu", "transformer.wpe": "cpu", "transformer.drop": "cpu",
              "transformer.h.0": "cpu", "transformer.h.1": "disk", "transformer.ln_f": "cpu"}  # fmt: skip
    model = load_checkpoint_and_dispatch(model, checkpoint, device_map=placed, offload_folder=tmp_path).eval()
    assert model.transformer.h[1].mlp.c_fc.weight.device.type == "meta"
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, pair[1](ids).logits)


def test_no_block_is_split_by_an_automatic_device_map(ours):
    block = sum(p.numel() * 4 for p in ours.transformer.h[0].parameters())
    placed = infer_auto_device_map(
        ours, max_memory={"cpu": 2 * block, "disk": 100 * block}, no_split_module_classes=ours._no_split_modules
    )
    assert "disk" in placed.values() and not [name for name in placed if name.startswith("transformer.h.0.")]


def test_the_tokenizer_is_one_that_every_library_reads_and_has_no_chat_template(unbroken_run):
    folder = unbroken_run / "latest"
    text = "def train(steps=3):\n    return 'naïve' <|endoftext|>"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template is None
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids == tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
