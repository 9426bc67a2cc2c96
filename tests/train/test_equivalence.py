"""The whole loop against the lecture's (Karpathy, "Let's reproduce GPT-2 (124M)"), written anew on stock GPT-2."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2repro.data.shards import open_dataset
from tests.conftest import TINY, train_rows

B, T, ACCUMULATION = TINY["micro_batch_size"], TINY["seq_len"], 2
PEAK, WARMUP, STEPS = 3e-3, 6, 60


def lecture_lr(step: int) -> float:
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    progress = (step - WARMUP) / (STEPS - WARMUP)
    return 0.1 * PEAK + 0.5 * (1 + math.cos(math.pi * progress)) * (PEAK - 0.1 * PEAK)


def lecture_losses(model: GPT2LMHeadModel, tokens: torch.Tensor) -> list[float]:
    """The loss of every step: batches in the order of the text, summed gradients, clipping, AdamW in two groups."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    losses, position = [], 0
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_sum = 0.0
        for _ in range(ACCUMULATION):
            batch = tokens[position : position + B * T + 1]
            x, y = batch[:-1].view(B, T), batch[1:].view(B, T)
            position += B * T
            loss = F.cross_entropy(model(x).logits.view(B * T, -1), y.reshape(-1)) / ACCUMULATION
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lecture_lr(step)
        optimizer.step()
        losses.append(loss_sum)
    return losses


def test_sixty_steps_have_the_losses_of_the_lectures_loop(train_script, tiny_dataset, tmp_path):
    torch.manual_seed(0)
    shape = {name: TINY[name] for name in ("n_layer", "n_head", "n_embd", "n_positions")}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    stock = GPT2LMHeadModel(GPT2Config(**shape, **no_dropout, vocab_size=512, bos_token_id=0, eos_token_id=0)).train()
    stock.save_pretrained(tmp_path / "stock")
    train_script(
        tmp_path / "run", init_from=tmp_path / "stock", max_steps=STEPS, warmup_steps=WARMUP, learning_rate=PEAK,
        shuffle="false", eval_every=0, save_every=STEPS,
    )
    stream = open_dataset(tiny_dataset).split("train")
    tokens = torch.from_numpy(stream.read(0, STEPS * ACCUMULATION * B * T + 1).astype("int64"))
    expected = lecture_losses(stock, tokens)
    rows = train_rows(tmp_path / "run")
    assert [row["lr"] for row in rows.values()] == pytest.approx([lecture_lr(step) for step in range(STEPS)])
    assert max(row["grad_norm"] for row in rows.values()) > 1.0  # so that clipping counts
    assert expected[-1] < expected[0] - 0.5
    assert [row["loss"] for row in rows.values()] == pytest.approx(expected, abs=1e-5)
