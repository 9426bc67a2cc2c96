"""The picture of the weights: what its numbers say of smooth and of noisy tables."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gpt2repro.tools.inspect_model import draw_weights, measure, position_table, roughness, similarity


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
    counted = sum(figures["count"] for figures in measure(tiny_model)["weights"].values())
    assert counted == sum(parameter.numel() for parameter in tiny_model.parameters() if parameter.dim() == 2)


@pytest.mark.parametrize("which", ["tiny_model", "stock_model"])
def test_a_picture_is_drawn_for_our_model_and_the_librarys(which, request, tmp_path):
    draw_weights(request.getfixturevalue(which), tmp_path / "weights.png", title=which)
    assert (tmp_path / "weights.png").stat().st_size > 20_000


def test_a_model_without_a_position_table_says_so(tmp_path):
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **shape))
    assert measure(model)["position_embedding"] is None
    draw_weights(model, tmp_path / "weights.png")
    assert (tmp_path / "weights.png").is_file()
