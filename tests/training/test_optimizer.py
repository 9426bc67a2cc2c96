"""Parameter groups, and the updates against an AdamW put together by hand."""

import copy

import torch

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.training.arguments import Recipe
from gpt2repro.training.optimizer import make_optimizer
from modeling_gpt2repro import GPT2ReproForCausalLM


def make_model():
    torch.manual_seed(0)
    return GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=64))


def test_matrices_and_embeddings_decay_and_vectors_do_not():
    model = make_model()
    decayed, plain = make_optimizer(model, Recipe(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in plain["params"]} == {1}
    # Two embeddings and four matrices a layer; the tied head is not counted twice.
    assert len(decayed["params"]) == 2 + 4 * 2
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_updates_equal_those_of_an_unfused_adamw():
    model = make_model()
    reference_model = copy.deepcopy(model)
    optimizer = make_optimizer(model, Recipe(learning_rate=1e-2, weight_decay=0.5))
    named = dict(reference_model.named_parameters())
    reference = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n.endswith("bias") or "ln_" in n], "weight_decay": 0.0},
            {"params": [p for n, p in named.items() if not (n.endswith("bias") or "ln_" in n)]},
        ],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5, fused=False, foreach=False,
    )  # fmt: skip
    for _ in range(5):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            named[name].grad = parameter.grad.clone()
        optimizer.step()
        reference.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, named[name], atol=1e-6, rtol=1e-5)
