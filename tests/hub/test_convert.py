"""Conversion between stock GPT-2 and ours."""

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gpt2repro.hub.convert import TRANSPOSED, from_stock, load_as_gpt2repro, main, to_stock

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": 512}


@pytest.fixture
def stock():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**TINY, bos_token_id=0, eos_token_id=0)).eval()


def test_a_round_trip_changes_no_byte_of_any_tensor(stock):
    there = from_stock(stock)
    back = to_stock(there)
    ours, again = there.state_dict(), back.state_dict()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(again[name], tensor)
        assert torch.equal(ours[name].t() if name.endswith(TRANSPOSED) else ours[name], tensor)
    settings = [{**model.config.to_diff_dict(), "dtype": None} for model in (back, stock)]
    assert settings[0] == settings[1]
    assert back.lm_head.weight is back.transformer.wte.weight


def test_the_command_writes_complete_checkpoints_both_ways(stock, tiny_dataset, tmp_path, capsys):
    stock.save_pretrained(tmp_path / "stock")
    AutoTokenizer.from_pretrained(tiny_dataset).save_pretrained(tmp_path / "stock")
    assert main([str(tmp_path / "stock"), str(tmp_path / "ours"), "--to", "gpt2repro"]) == 0
    assert main([str(tmp_path / "ours"), str(tmp_path / "again"), "--to", "gpt2"]) == 0
    assert "gpt2repro, " in capsys.readouterr().out
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "again")
    for name, tensor in stock.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (tiny_dataset, tmp_path / "again")]
    assert tokenizers[0]("def train():")["input_ids"] == tokenizers[1]("def train():")["input_ids"]


def test_what_cannot_be_converted_is_refused_and_nothing_is_overwritten(stock, tmp_path, capsys):
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx=True"):
        from_stock(GPT2LMHeadModel(GPT2Config(**TINY, scale_attn_by_inverse_layer_idx=True)))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="holds a bert model: expected gpt2 or gpt2repro"):
        load_as_gpt2repro(tmp_path / "bert")
    with pytest.raises(ValueError, match="no checkpoint loads from"):
        load_as_gpt2repro(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert main([str(tmp_path / "bert"), str(tmp_path / "full"), "--to", "gpt2"]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
