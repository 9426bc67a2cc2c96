"""The command that inspects a dataset or a checkpoint: its page of text, its pictures, its numbers."""

import json
import math
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gpt2repro.tools.inspect import main, model_summary, position_table, roughness, similarity, weights_by_kind


def test_noise_has_roughness_one_and_a_smooth_table_almost_none():
    noise = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    assert roughness(noise).tolist() == pytest.approx([1.0] * 8, abs=0.05)
    wave = torch.sin(torch.linspace(0, 2 * math.pi, 1024))[:, None]
    step = 2 * math.pi / 1023
    assert roughness(wave).item() == pytest.approx(step**2 / 2, rel=0.01)  # mean of (step cos)^2 over 2 var(sin)


def test_similarity_is_the_cosine_of_every_pair(tiny_model):
    table = position_table(tiny_model)
    cosines = similarity(table)
    expected = torch.nn.functional.cosine_similarity(table[3], table[7], dim=0).item()
    assert cosines[3, 7].item() == pytest.approx(expected, abs=1e-6)
    assert cosines.diagonal().tolist() == pytest.approx([1.0] * len(table), abs=1e-5)


def test_every_matrix_of_gpt2_is_counted_once(tiny_model):
    counted = sum(len(values) for values in weights_by_kind(tiny_model).values())
    assert counted == sum(parameter.numel() for parameter in tiny_model.parameters() if parameter.dim() == 2)


def test_a_model_without_a_position_table_says_so():
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **shape))
    assert next(model_summary(model)) == "position embedding: none (the model has no learned table)"


@pytest.mark.parametrize("which", ["tiny_model", "stock_model"])
def test_a_checkpoint_of_ours_and_of_the_librarys_is_drawn(which, request, bpe, tmp_path, capsys):
    request.getfixturevalue(which).save_pretrained(tmp_path / "model")
    bpe.save_pretrained(tmp_path / "model")
    assert main([str(tmp_path / "model"), "--output", str(tmp_path / "new" / "positions.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("position embedding [64, 32]: roughness ")
    assert {line.split(":")[0] for line in lines[1:-1]} >= {"wte", "wpe", "attn.c_attn", "mlp.c_proj"}
    assert (tmp_path / "new" / "positions.png").stat().st_size > 20_000


def test_a_run_s_checkpoint_is_verified(unbroken_run, tmp_path, capsys):
    copy = shutil.copytree(unbroken_run / "latest", tmp_path / "copy")
    assert main([str(copy), "--verify"]) == 0
    assert capsys.readouterr().out.endswith("verified: every sha256 is as recorded\n")
    (copy / "optimizer.safetensors").write_bytes(b"")
    assert main([str(copy), "--verify"]) == 1
    assert "optimizer.safetensors has 0 bytes" in capsys.readouterr().err


def test_a_datasets_page_has_its_tokens_documents_and_source(tiny_dataset, tmp_path, capsys):
    info = json.loads((tiny_dataset / "dataset.json").read_text())
    assert main([str(tiny_dataset), "--verify", "--histogram", str(tmp_path / "lengths.png")]) == 0
    out = capsys.readouterr().out
    for name in ("train", "val"):
        assert f"{name}: {info['splits'][name]['tokens']:,} tokens in " in out
        assert f"{info['splits'][name]['documents']:,} documents, " in out
    assert '"name": "python-docs"' in out
    assert "verified: every sha256 is as recorded" in out
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
