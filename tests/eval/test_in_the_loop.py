"""Training, validation, benchmarks and samples on one compiled model, and what the modules need to be imported."""

import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from eval.multiple_choice import evaluate_tasks, prepare_task
from eval.sample import sample
from eval.validation import validation_loss
from gpt2repro.data.shards import open_dataset
from tests.conftest import train_rows


def test_nothing_is_compiled_after_the_first_round_of_training_and_evaluating(fresh_model, bpe, tmp_path):
    data = tmp_path / "piqa.jsonl"
    rows = [{"goal": "The man " * (n + 1), "sol1": "throws " * (n + 2), "sol2": "it", "label": 0} for n in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [prepare_task(f"piqa={data}", bpe, max_length=64)]
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(fresh_model.parameters())
    graphs = []
    fresh_model.compile(backend=lambda module, _: graphs.append(module) or module.forward, dynamic=False)
    compiled_after_round, losses = [], []
    for _ in range(3):
        fresh_model.train()
        inputs, targets = (torch.randint(0, 300, (2, 16), generator=generator) for _ in range(2))
        call = {"shift_labels": targets, "num_items_in_batch": 1, "skip_logits": True, "use_cache": False}
        fresh_model(inputs, **call).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        fresh_model.eval()
        losses.append(validation_loss(fresh_model, [{"input_ids": inputs, "shift_labels": targets}] * 2)[0])
        evaluate_tasks(fresh_model, tasks)
        sample(fresh_model, bpe, "The man", num_samples=1, max_new_tokens=3)
        compiled_after_round.append(len(graphs))
    assert compiled_after_round == [2, 2, 2]  # one to train with, one to validate with
    assert len(set(losses)) == 3


def test_a_run_records_bits_per_byte_beside_its_loss(unbroken_run, tiny_dataset):
    row = train_rows(unbroken_run, "val")[max(train_rows(unbroken_run, "val"))]
    ids = open_dataset(tiny_dataset).split("val").read(1, row["eval_tokens"])
    text = AutoTokenizer.from_pretrained(tiny_dataset).decode(ids, skip_special_tokens=True)
    bits = row["loss"] * row["eval_tokens"] / math.log(2)
    assert row["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-6)


def test_local_evaluation_imports_nothing_that_only_the_hub_pictures_or_lm_eval_need():
    modules = "hellaswag in_training lm_harness multiple_choice sample validation".split()
    program = f"""
import sys
for name in ("datasets", "evaluate", "lm_eval", "matplotlib", "pandas"):
    sys.modules[name] = None  # an import of it fails
for name in {modules!r}:
    __import__("eval." + name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
