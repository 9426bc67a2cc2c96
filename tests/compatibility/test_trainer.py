"""Transformers' `Trainer` drives the model as it drives its own."""

import math
from dataclasses import fields

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.hub.convert import from_stock
from modeling_gpt2repro import GPT2ReproForCausalLM

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": 64}
# The library's name for gradient checkpointing since 5.24, or the one before.
NAMES = {field.name for field in fields(TrainingArguments)}
RECOMPUTE = "activation_checkpointing" if "activation_checkpointing" in NAMES else "gradient_checkpointing"


@pytest.fixture(autouse=True)
def nothing_is_left_of_accelerates_state():
    """It holds the precision, once for a process: whoever asks for another one later is refused."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def windows(count: int) -> list[dict]:
    """Sequences that count upwards by steps of their own, so that there is something to learn; some targets masked."""
    rows = [(torch.arange(32) * (1 + row % 3) + row) % SHAPE["vocab_size"] for row in range(count)]
    return [
        {"input_ids": ids, "labels": ids.where(torch.arange(32) < 32 - row % 5, -100)} for row, ids in enumerate(rows)
    ]


def train(folder, *, resume=None, count: int = 64, **settings):
    set_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**SHAPE, bos_token_id=0, eos_token_id=0))
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, learning_rate=3e-3,
        lr_scheduler_type="constant", seed=0, **{"save_strategy": "no", **settings},
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=windows(count))
    trainer.train(resume_from_checkpoint=resume)
    return model, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_it_trains_in_bf16_with_accumulation_and_gradient_checkpointing(tmp_path):
    _, losses = train(
        tmp_path, bf16=True, **{RECOMPUTE: True}, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, max_steps=40,
    )  # fmt: skip
    assert abs(losses[0] - math.log(64)) < 0.3
    assert losses[-1] < 0.7 * losses[0]


def test_one_step_of_eight_sequences_is_eight_micro_steps_of_one(tmp_path):
    results = [
        train(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch, max_steps=4)
        for batch in (8, 1)
    ]
    (model, losses), (other, others) = results
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(others), atol=1e-5, rtol=1e-5)
    for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, same, atol=1e-5, rtol=1e-4)


def test_a_resumed_run_ends_where_the_unbroken_one_does(tmp_path):
    settings = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3}
    unbroken, losses = train(tmp_path / "a", max_steps=6, **settings)
    train(tmp_path / "b", max_steps=3, **settings)
    resumed, again = train(tmp_path / "b", resume=str(tmp_path / "b" / "checkpoint-3"), max_steps=6, **settings)
    assert again == losses
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True))


def evaluated(model, folder, **settings) -> dict:
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, per_device_eval_batch_size=4, **settings
    )
    return Trainer(model=model, args=arguments, eval_dataset=windows(12)).evaluate()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_evaluate_reports_the_eval_loss_of_stock_gpt2_also_with_label_smoothing(tmp_path, smoothing):
    set_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(**SHAPE, bos_token_id=0, eos_token_id=0, initializer_range=0.2)).eval()
    # The library finds the loss of its own GPT-2 by this name only. Without it Trainer counts the first label of each
    # row, which nothing predicts, and reports (T - 1) / T of the mean loss.
    stock.loss_type = "ForCausalLM"
    ours = from_stock(stock)
    losses = [evaluated(model, tmp_path, label_smoothing_factor=smoothing)["eval_loss"] for model in (ours, stock)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    if not smoothing:
        batch = {name: torch.stack([row[name] for row in windows(12)]) for name in ("input_ids", "labels")}
        with torch.no_grad():
            logits = stock(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        assert losses[0] == pytest.approx(F.cross_entropy(logits, batch["labels"][:, 1:].flatten()).item(), rel=5e-3)
