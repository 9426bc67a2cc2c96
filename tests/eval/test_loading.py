"""What loads as a model for evaluation, what is refused, and what the commands say of themselves."""

import copy
import importlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval import multiple_choice, validation
from eval.loading import load_model
from gpt2repro.hub.loading import check_finite
from modeling_gpt2repro import GPT2ReproForCausalLM


def test_a_checkpoint_loads_through_the_classes_of_this_checkout_without_trust(checkpoint, tiny_model):
    model, tokenizer = load_model(str(checkpoint), device="cpu")
    assert type(model) is GPT2ReproForCausalLM
    assert not model.training
    ids = tokenizer("The man", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_model(ids).logits)


def test_a_lora_adapter_loads_as_its_base_with_the_adapter_merged(checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(GPT2ReproForCausalLM.from_pretrained(checkpoint), lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    model, tokenizer = load_model(str(tmp_path / "adapter"), device="cpu")
    assert type(model) is GPT2ReproForCausalLM and not model.training
    ids = tokenizer("The man", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, adapted(input_ids=ids).logits, atol=1e-4)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"the LoRA adapter in .*adapter does not load"):
        load_model(str(tmp_path / "adapter"), device="cpu")


def test_code_beside_the_weights_is_not_run_without_trust(checkpoint, tmp_path):
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


def test_a_device_that_does_not_exist_is_one_error(checkpoint):
    with pytest.raises(ValueError, match=r"the device nosuch cannot be used \(.*\): give another"):
        load_model(str(checkpoint), device="nosuch")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda weights, key: weights.pop(key), r"not those of its configuration \(missing: .*c_fc\.weight\)"),
        (lambda weights, key: weights.update({key: weights[key][:3].clone()}), r"\(wrong shape: .*\[3, 32\]\)"),
        (lambda weights, key: weights.update({key.replace("1", "2"): weights[key].clone()}), r"\(unexpected: .*h\.2"),
        (lambda weights, key: weights[key][0].fill_(float("nan")), r"NaN or infinite weights in .*c_fc\.weight"),
        (lambda weights, key: weights[key][0].fill_(float("inf")), "give an earlier checkpoint"),
        (lambda weights, key: weights[key][0].fill_(1e6), r"infinite weights in .*c_fc\.weight \(float16\)"),
    ],
    ids=["missing", "another shape", "another layer", "NaN", "infinite", "too large for float16"],
)
def test_weights_that_are_not_the_configurations_or_not_finite_are_refused(checkpoint, tmp_path, damage, message):
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    weights = load_file(damaged / "model.safetensors")
    damage(weights, "transformer.h.1.mlp.c_fc.weight")
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_model(str(damaged), device="cpu", dtype="float16" if "float16" in message else "float32")


def test_nan_in_a_buffer_is_refused_and_an_infinite_mask_is_none():
    model = torch.nn.BatchNorm1d(2)
    model.register_buffer("mask", torch.full((2, 2), -torch.inf))
    check_finite("model", model)
    model.running_mean[1] = torch.nan
    with pytest.raises(ValueError, match="model has NaN or infinite weights in running_mean"):
        check_finite("model", model)


def test_a_model_that_computes_nan_is_one_error_and_no_figure(tiny_model, bpe, tmp_path, capsys):
    model = copy.deepcopy(tiny_model)
    model.transformer.wte.weight.data *= 1e38  # finite, but not its squares
    for part in (model, bpe):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "text.json").write_text("The man throws the ball.")
    item = {"goal": "Throw it.", "sol1": "far", "sol2": "near", "label": 0}
    (tmp_path / "piqa.jsonl").write_text(json.dumps(item) + "\n")
    words = ["--model", str(tmp_path / "model"), "--device", "cpu", "--output", str(tmp_path / "new.json")]
    assert validation.main([*words, "--text", str(tmp_path / "text.json")]) == 1
    assert "text.json: the loss is nan in float32: give --dtype float32, or" in capsys.readouterr().err
    assert multiple_choice.main([*words, "--task", "piqa", "--data", str(tmp_path / "piqa.jsonl")]) == 1
    assert "the scores are NaN in torch.float32" in capsys.readouterr().err
    assert not (tmp_path / "new.json").exists()


def test_a_truncated_file_of_weights_is_one_error(checkpoint, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    with open(damaged / "model.safetensors", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(ValueError, match=str(damaged)):
        load_model(str(damaged), device="cpu")


DEFAULTS = {
    "hellaswag": ["float32", "completion for hellaswag"],
    "lm_harness": ["16", "lm_eval.json in the checkpoint's folder"],
    "sample": ["4", "32", "50", "1.0", "42"],
    "validation": ["4"],
}


@pytest.mark.parametrize("command", DEFAULTS)
def test_the_help_of_a_command_names_the_defaults_of_its_flags(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"eval.{command}").main(["--help"])
    said = capsys.readouterr().out
    assert all(f"(default: {value}" in said for value in DEFAULTS[command])
