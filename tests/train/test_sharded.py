"""Training with every tensor in shards (FSDP2), over gloo on two CPU processes; see sharded_on_cpu.py."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import train_rows

SAMPLES = {"sample_every": 4, "sample_tokens": 4, "num_samples": 1}


@pytest.fixture(scope="module")
def sharded_run(train_script, sharded, tmp_path_factory) -> Path:
    """The tiny run of conftest.py, sharded; samples on the way."""
    run_dir = tmp_path_factory.mktemp("runs") / "sharded"
    train_script(run_dir, **SAMPLES, **sharded)
    return run_dir


def assert_close(run_dir: Path, expected_dir: Path) -> None:
    for kind in ("train", "val"):
        found, expected = train_rows(run_dir, kind), train_rows(expected_dir, kind)
        assert found.keys() == expected.keys()
        assert all(found[step]["loss"] == pytest.approx(row["loss"], abs=1e-5) for step, row in expected.items())
    for file in ("model.safetensors", "optimizer.safetensors"):
        found, expected = load_file(run_dir / "latest" / file), load_file(expected_dir / "latest" / file)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-3)


def test_sharded_training_gives_what_one_process_gives(sharded_run, unbroken_run):
    assert_close(sharded_run, unbroken_run)
    norms = {step: row["grad_norm"] for step, row in train_rows(unbroken_run).items()}
    found = {step: row["grad_norm"] for step, row in train_rows(sharded_run).items()}
    assert found == pytest.approx(norms, rel=1e-4)


def test_a_sharded_runs_checkpoint_is_a_whole_transformers_checkpoint(sharded_run, unbroken_run):
    names = [sorted(file.name for file in (run / "latest").iterdir()) for run in (sharded_run, unbroken_run)]
    assert names[0] == names[1]
    assert (sharded_run / "latest" / "config.json").read_text() == (unbroken_run / "latest/config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(sharded_run / "latest", trust_remote_code=True)
    assert type(model).__name__ == "GPT2ReproForCausalLM"
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_sharded_run_resumes_bit_exactly_and_also_unsharded(
    sharded_run, unbroken_run, train_script, sharded, tmp_path
):
    for name, settings in (("sharded", sharded), ("whole", {})):
        run_dir = shutil.copytree(sharded_run, tmp_path / name, symlinks=True)
        shutil.rmtree(run_dir / "step-00000008")
        assert "resumed from" in train_script(run_dir, **SAMPLES, **settings)
    for file in ("model.safetensors", "optimizer.safetensors"):
        found, expected = load_file(tmp_path / "sharded/latest" / file), load_file(sharded_run / "latest" / file)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert_close(tmp_path / "whole", unbroken_run)


def test_an_unsharded_run_resumes_sharded_in_bf16_with_fp32_weights(unbroken_run, train_script, sharded, tmp_path):
    run_dir = shutil.copytree(unbroken_run, tmp_path / "run", symlinks=True)
    shutil.rmtree(run_dir / "step-00000008")
    output = train_script(run_dir, mixed_precision="bf16", gradient_checkpointing="true", **sharded)
    assert "resumed from" in output
    assert "bf16 mixed precision" in output
    half, full = train_rows(run_dir), train_rows(unbroken_run)
    assert all(half[step]["loss"] == pytest.approx(row["loss"], abs=0.02) for step, row in full.items())
    assert half[8]["loss"] != full[8]["loss"]
    assert {tensor.dtype for tensor in load_file(run_dir / "latest/optimizer.safetensors").values()} == {torch.float32}
