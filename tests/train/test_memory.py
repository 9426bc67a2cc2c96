"""The memory estimate against what autograd keeps for the backward of the real model."""

import pytest
import torch

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.recipe import Recipe
from gpt2repro.train.estimates import memory_estimate, memory_report
from gpt2repro.train.optimizer import make_optimizer
from modeling_gpt2repro import GPT2ReproForCausalLM

V, B, T = 128, 2, 288  # beyond the lengths at which a CPU writes attention out


def kept_bytes(model: GPT2ReproForCausalLM, *, bf16: bool) -> int:
    """Bytes of all storages that a forward saves for its backward, parameters aside, each counted once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes back
        return tensor

    ids = torch.randint(V, (B, T))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast(
        "cpu", torch.bfloat16, enabled=bf16
    ):
        model(ids, shift_labels=ids, use_cache=False, skip_logits=True)
    return sum(size for pointer, (size, _) in kept.items() if pointer not in parameters)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_activations_are_those_that_autograd_keeps(bf16, gradient_checkpointing):
    config = GPT2ReproConfig(
        n_layer=6, n_embd=128, n_head=4, vocab_size=V, n_positions=T, bos_token_id=0, eos_token_id=0
    )
    model = GPT2ReproForCausalLM(config).train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    recipe = Recipe(micro_batch_size=B, seq_len=T, gradient_checkpointing=gradient_checkpointing)
    parts = memory_estimate(recipe, config, n_parameters=model.num_parameters(), bf16=bf16, chunked_loss=False)
    expected = parts["activations"] + 4 * V * B * T  # of the logits autograd keeps the fp32 log-softmax
    if gradient_checkpointing:
        expected -= (36 if bf16 else 64) * 128 * B * T  # the block that is recomputed exists in the backward only
    elif bf16:
        expected += 2 * 12 * 128 * 128 * 6  # the bf16 copies of the blocks' matrices
    assert kept_bytes(model, bf16=bf16) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizer_holds_what_is_said(optimizer):
    config = GPT2ReproConfig(
        n_layer=2, n_embd=64, n_head=4, vocab_size=V, n_positions=T, bos_token_id=0, eos_token_id=0
    )
    model = GPT2ReproForCausalLM(config)
    recipe = Recipe(optimizer=optimizer)
    used = make_optimizer(model, recipe)
    ids = torch.randint(V, (B, T))
    model(ids, shift_labels=ids, use_cache=False).loss.backward()
    used.step()
    state = [tensor for values in used.state.values() for tensor in values.values() if tensor.dim()]
    parts = memory_estimate(recipe, config, n_parameters=model.num_parameters(), bf16=False, chunked_loss=False)
    assert sum(tensor.nbytes for tensor in state) == parts["optimizer"]


@pytest.mark.parametrize(
    ("micro_batch_size", "layers", "expected"),
    [
        (4, 12, "micro_batch_size up to 16 should fit"),
        (4, 10**7, "it may not fit: no micro_batch_size should fit"),
    ],
)
def test_the_report_says_what_fits(micro_batch_size, layers, expected):
    recipe = Recipe(micro_batch_size=micro_batch_size, seq_len=64, global_batch_tokens=64 * 32)
    config = GPT2ReproConfig(n_layer=layers, n_embd=64, n_head=4, vocab_size=V)
    line = memory_report(
        recipe, config, torch.device("cpu"), processes=2, n_parameters=10**6, bf16=True, chunked_loss=True
    )
    assert line.startswith("memory: about ")
    assert "parameters 0.00, gradients 0.00, optimizer 0.01" in line
    assert line.endswith(expected)
