"""The script as people run it: real processes, real checkpoints, kills (signals: train/test_stops.py)."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.conftest import ROOT, TINY, end, kill, train_rows


def weights(run_dir):
    return load_file(run_dir / "latest" / "model.safetensors")


def assert_same_bits(run_dir, expected_dir):
    """Every tensor of the last checkpoint, the optimizer's too, and every logged loss."""
    for file in ("model.safetensors", "optimizer.safetensors"):
        found = load_file(run_dir / "latest" / file)
        expected = load_file(expected_dir / "latest" / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for kind in ("train", "val"):
        found, expected = train_rows(run_dir, kind), train_rows(expected_dir, kind)
        assert {s: row["loss"] for s, row in found.items()} == {s: row["loss"] for s, row in expected.items()}


def test_a_run_starts_at_ln_vocab_and_learns(unbroken_run):
    losses = {step: row["loss"] for step, row in train_rows(unbroken_run).items()}
    validations = {step: row["loss"] for step, row in train_rows(unbroken_run, "val").items()}
    assert list(losses) == list(range(1, 9))
    assert list(validations) == [0, 4, 8]
    assert validations[0] == pytest.approx(math.log(512), abs=0.15)
    assert validations[8] < validations[4] < validations[0] - 0.05


def test_a_run_leaves_its_record_and_the_checkpoints_it_was_asked_to_keep(unbroken_run):
    assert sorted(path.name for path in unbroken_run.iterdir()) == [
        "latest", "metrics.jsonl", "recipe.yaml", "run.json", "step-00000006", "step-00000008",
    ]  # fmt: skip
    assert os.readlink(unbroken_run / "latest") == "step-00000008"
    assert AutoTokenizer.from_pretrained(unbroken_run / "latest").model_max_length == TINY["n_positions"]
    assert not [path for path in unbroken_run.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth")]


def test_a_log_gets_lines_and_no_bar(unbroken_run):
    output = unbroken_run.with_suffix(".log").read_text()
    first = train_rows(unbroken_run)[1]
    speed = first["tokens_per_second"]
    left = 7 * 256 / speed / 60  # of 8 steps of 256 tokens
    assert f"\nstep      1  loss {first['loss']:.4f}, {speed:,.0f} tokens/s, {left:.1f} minutes left\n" in output
    assert "step/s" not in output  # as every bar has it, from its first moment on


def test_the_saved_recipe_runs_the_same_again(unbroken_run, train_script, tmp_path):
    from gpt2repro.recipe_parser import DEFAULT_RECIPE, parse_recipe

    saved = parse_recipe(["--recipe", str(unbroken_run / "recipe.yaml")], default=DEFAULT_RECIPE)
    assert saved == parse_recipe(train_script.flags(unbroken_run), default=DEFAULT_RECIPE)


def test_two_processes_equal_one_bitwise(unbroken_run, train_script, tmp_path):
    train_script(tmp_path / "run", processes=2)
    assert_same_bits(tmp_path / "run", unbroken_run)


def test_one_micro_step_of_eight_equals_eight_of_one(unbroken_run, train_script, tmp_path):
    for name, size in (("whole", 8), ("single", 1)):
        train_script(tmp_path / name, micro_batch_size=size)
    whole, single = weights(tmp_path / "whole"), weights(tmp_path / "single")
    for name, tensor in whole.items():
        torch.testing.assert_close(single[name], tensor, atol=2e-5, rtol=1e-4)
    one, eight = train_rows(tmp_path / "whole"), train_rows(tmp_path / "single")
    assert all(eight[step]["loss"] == pytest.approx(row["loss"], abs=1e-5) for step, row in one.items())


@pytest.mark.parametrize(("processes", "then"), [(1, 1), (2, 2), (1, 2)])
def test_resume_after_a_kill_continues_bit_exactly(unbroken_run, train_script, tmp_path, processes, then):
    run_dir = tmp_path / "run"
    process = train_script.start_paused(run_dir, "step 5", processes=processes)
    kill(process)
    end(process)
    assert sorted(path.name for path in run_dir.glob("step-*")) == ["step-00000003"]
    assert "resumed from" in train_script(run_dir, processes=then)
    assert_same_bits(run_dir, unbroken_run)


def test_going_back_repeats_the_run_with_the_same_dropout_and_renames_newer_checkpoints(train_script, tmp_path):
    run_dir = tmp_path / "run"
    train_script(run_dir, dropout=0.1, keep_last=0)
    shutil.copytree(run_dir, tmp_path / "unbroken", symlinks=True)
    train_script(run_dir, dropout=0.1, keep_last=1, resume=run_dir / "step-00000003")
    assert_same_bits(run_dir, tmp_path / "unbroken")
    assert sorted(path.name for path in run_dir.glob("*step-*")) == [
        "abandoned-step-00000006", "abandoned-step-00000008", "step-00000008",
    ]  # fmt: skip


def test_compile_validation_hellaswag_and_samples_share_a_run_without_recompiling(
    unbroken_run, train_script, tmp_path
):
    items = [
        {"ctx": f"Return item {i} of", "endings": ["a list", "b", "the", "ccc"], "label": i % 4} for i in range(6)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    output = train_script(
        tmp_path / "run", compile="true", sample_every=2, sample_tokens=5,
        eval_tasks=f"hellaswag:completion={tmp_path / 'items.jsonl'}",
        env={"TORCH_LOGS": "recompiles", "PYTHONUNBUFFERED": "1"},  # so that lines are in the order of what happened
    )  # fmt: skip
    lines = output.splitlines()
    first_training_step = next(i for i, line in enumerate(lines) if line.startswith("step      1  loss"))
    recompiled = [i for i, line in enumerate(lines) if "Recompiling function" in line]
    # The validation at step 0 compiles its graph, the first step one of its own; nothing after that.
    assert len(recompiled) == 1, output
    assert recompiled[0] <= first_training_step
    assert sum("sample: Hello" in line for line in lines) == 5 * 4  # at steps 0, 2, 4, 6, 8
    assert [row["n"] for row in train_rows(tmp_path / "run", "eval").values()] == [6, 6]
    for kind in ("train", "val"):
        eager, compiled = train_rows(unbroken_run, kind), train_rows(tmp_path / "run", kind)
        assert all(compiled[step]["loss"] == pytest.approx(row["loss"], abs=1e-4) for step, row in eager.items())


def test_bf16_stays_close_to_fp32(unbroken_run, train_script, tmp_path):
    output = train_script(tmp_path / "run", mixed_precision="bf16", gradient_checkpointing="true")
    assert "bf16 mixed precision" in output
    full, half = train_rows(unbroken_run), train_rows(tmp_path / "run")
    assert all(half[step]["loss"] == pytest.approx(row["loss"], abs=0.02) for step, row in full.items())
    assert half[8]["loss"] != full[8]["loss"]
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}


def test_a_bad_step_is_not_applied_and_too_many_stop_the_run(train_script, tmp_path):
    output = train_script(tmp_path / "run", learning_rate=1e30, max_bad_steps=2, grad_clip=0, exit_code=1)
    assert "error: step" in output
    assert "3 in a row are more than max_bad_steps=2" in output
    bad = train_rows(tmp_path / "run", "bad_step")
    assert len(bad) == 2
    assert all(len(row["window_starts"]) == 8 for row in bad.values())


def test_a_run_starts_from_stock_gpt2_weights(unbroken_run, train_script, tmp_path):
    from gpt2repro.hub.convert import load_as_gpt2repro, to_stock

    to_stock(load_as_gpt2repro(unbroken_run / "latest")).save_pretrained(tmp_path / "stock")
    train_script(tmp_path / "run", init_from=tmp_path / "stock", max_steps=3)
    continued, unbroken = train_rows(tmp_path / "run", "val"), train_rows(unbroken_run, "val")
    assert continued[0]["loss"] == pytest.approx(unbroken[8]["loss"], abs=1e-5)
    assert continued[3]["loss"] < unbroken[8]["loss"]


def test_two_processes_asked_for_and_one_started_is_an_error(train_script, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = [*launcher, str(ROOT / "train_accelerate.py"), *train_script.flags(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "error: accelerate launch was asked for several processes and started one" in done.stderr
    assert "cpu_2proc.yaml" in done.stderr
    assert not (tmp_path / "run").exists()


def test_without_arguments_the_demo_runs():
    from gpt2repro.recipe_parser import DEFAULT_RECIPE, parse_recipe

    assert parse_recipe([], default=DEFAULT_RECIPE).output_dir == "runs/demo"
    assert DEFAULT_RECIPE == ROOT / "recipes" / "demo.yaml"


def test_the_raw_shards_of_nanogpt_train_as_they_are(unbroken_run, train_script, tiny_dataset, tmp_path):
    ids = np.concatenate([np.load(file) for file in sorted(tiny_dataset.glob("train-*.npy"))])
    val = np.concatenate([np.load(file) for file in sorted(tiny_dataset.glob("val-*.npy"))])
    (tmp_path / "nanogpt").mkdir()
    ids.astype("<u2").tofile(tmp_path / "nanogpt" / "train.bin")
    val.astype("<u2").tofile(tmp_path / "nanogpt" / "val.bin")
    train_script(tmp_path / "run", dataset_dir=tmp_path / "nanogpt", dataset_format="nanogpt", tokenizer=tiny_dataset)
    assert_same_bits(tmp_path / "run", unbroken_run)
