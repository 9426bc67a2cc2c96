"""The check against the released GPT-2 124M, as far as it goes without it."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gpt2repro.tools.verify import check_hellaswag, main
from tests.conftest import ROOT


def verify(*arguments, **env):
    command = [sys.executable, "-m", "gpt2repro.tools.verify", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=600
    )  # fmt: skip


def test_figures_within_a_tenth_of_a_point_pass_and_others_are_named():
    check_hellaswag({"completion": 29.55, "harness": 31.14})
    check_hellaswag({"completion": 29.46, "harness": 31.23})
    for off in ({"completion": 29.44}, {"harness": 31.25}, {"harness": float("nan")}):
        with pytest.raises(ValueError, match=r"29.55 %\), harness .*31.14 %\)"):
            check_hellaswag({"completion": 29.55, "harness": 31.14} | off)


def test_a_model_that_is_not_gpt2_ends_with_both_figures_and_exit_code_1(tmp_path, tiny_dataset):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 128, "vocab_size": 512}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "tiny")
    AutoTokenizer.from_pretrained(tiny_dataset).save_pretrained(tmp_path / "tiny")
    item = {"ind": 1, "activity_label": "Cooking", "ctx_a": "A man opens a pan.", "ctx_b": "he",
            "ctx": "A man opens a pan. he", "endings": ["eats it.", "stirs it.", "flies.", "is a pan."]}  # fmt: skip
    lines = [json.dumps({**item, "label": n % 4}) + "\n" for n in range(8)]
    (tmp_path / "hellaswag.jsonl").write_text("".join(lines))
    files = ["--model", tmp_path / "tiny", "--data", tmp_path / "hellaswag.jsonl"]
    done = verify(*files, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    # Every ending is right twice in eight items, whichever it is that the model prefers.
    assert error == (
        "error: HellaSwag's acc_norm is off by more than 0.1 points: completion 25.00 % (GPT-2 124M: 29.55 %), "
        "harness 25.00 % (GPT-2 124M: 31.14 %)"
    )
    assert "largest difference of logits: " in done.stdout
    assert "GPT-2 is a language model t" in done.stdout


def test_without_a_network_it_says_so_in_seconds(monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    assert main([]) == 1
    error = "error: the Hub does not answer: use a machine with a network, or give --model"
    assert capsys.readouterr().err.startswith(error)
    assert time.monotonic() - began < 30  # the imports are done
