"""What loads as a model for evaluation, what is refused, and what the commands say of themselves."""

import importlib
import sys

import pytest
import torch

from eval.loading import load_model
from modeling_gpt2repro import GPT2ReproForCausalLM


def test_a_checkpoint_loads_through_the_classes_of_this_checkout_without_trust(checkpoint, tiny_model):
    model, tokenizer = load_model(str(checkpoint), device="cpu")
    assert type(model) is GPT2ReproForCausalLM
    assert not model.training
    ids = tokenizer("The man", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_model(ids).logits)


def test_code_beside_the_weights_is_not_run_without_trust(checkpoint, tmp_path):
    import json
    import shutil

    foreign = tmp_path / "foreign"
    shutil.copytree(checkpoint, foreign)
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "model_type": "somebody_elses"}))
    (foreign / "configuration_gpt2repro.py").write_text("raise SystemExit('code beside the weights was run')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(foreign), device="cpu")


def test_a_folder_that_is_missing_or_holds_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no folder runs/no/latest"):
        load_model("runs/no/latest")
    with pytest.raises(ValueError, match=r"holds no config\.json: give a checkpoint folder"):
        load_model(str(tmp_path))


DEFAULTS = {
    "app": ["7860"],
    "doctor": ["1"],
    "hellaswag": ["float32", "completion for hellaswag"],
    "lm_harness": ["16", "lm_eval.json in the checkpoint's folder"],
    "sample": ["4", "32", "50", "1.0", "42"],
    "validation": ["4"],
    "verify_gpt2": ["openai-community/gpt2"],
}


@pytest.mark.parametrize("command", DEFAULTS)
def test_the_help_of_a_command_names_the_defaults_of_its_flags(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"eval.{command}").main()
    said = capsys.readouterr().out
    assert all(f"(default: {value}" in said for value in DEFAULTS[command])
