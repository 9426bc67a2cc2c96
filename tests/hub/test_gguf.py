"""One file for llama.cpp: read back by Transformers, run by llama.cpp."""

import math
import sys

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.hub.gguf import main, write_gguf
from modeling_gpt2repro import GPT2ReproForCausalLM

gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
TEXT = "Return the length of naïve “text”  — it's 1234\n\n    def f():  # <|endoftext|>x"


@pytest.fixture(scope="module")
def checkpoint(tiny_dataset, tmp_path_factory):
    """Random weights, and 8 embedding rows more than the tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("gguf") / "checkpoint"
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "initializer_range": 0.3}
    tokenizer = AutoTokenizer.from_pretrained(tiny_dataset)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, vocab_size=len(tokenizer) + 8, **special))
    # llama.cpp's server leaves a token that ends inside a character out of its answer: these are never the likeliest.
    incomplete = [token for token in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([token])]
    model.get_input_embeddings().weight.data[incomplete] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gguf_file(checkpoint):
    file = checkpoint.parent / "tiny.gguf"
    assert main([str(checkpoint), str(file)]) == 0
    return file


def test_transformers_reads_the_same_logits_and_tokens(checkpoint, gguf_file):
    ours = GPT2ReproForCausalLM.from_pretrained(checkpoint)
    loaded = GPT2LMHeadModel.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, n_positions=64)
    ids = torch.randint(0, ours.config.vocab_size, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, ours(ids).logits, atol=1e-5, rtol=0)
    tokenizers = [
        AutoTokenizer.from_pretrained(checkpoint),
        AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name),
    ]
    assert tokenizers[0](TEXT)["input_ids"] == tokenizers[1](TEXT)["input_ids"]


def test_an_untied_head_is_written_as_a_tensor_of_its_own(checkpoint, tmp_path):
    model = GPT2ReproForCausalLM.from_pretrained(checkpoint, tie_word_embeddings=False)
    torch.nn.init.normal_(model.lm_head.weight)
    model.config.tie_word_embeddings = True  # the tensors count, not what the configuration says
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    write_gguf(tmp_path, tmp_path / "untied.gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "untied.gguf").tensors}
    assert (tensors["output.weight"] == model.lm_head.weight.detach().numpy()).all()
    assert (tensors["token_embd.weight"] == model.transformer.wte.weight.detach().numpy()).all()


def test_llama_cpp_runs_it_with_the_same_tokens_and_probabilities(checkpoint, gguf_file):
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf_file)
    params.n_ctx, params.n_gpu_layers, params.warmup, params.verbosity = 64, 0, False, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    answer = xllamacpp.Server(params).handle_completions(
        {"prompt": "Return the length of", "n_predict": 12, "temperature": 0.0, "n_probs": 5}
    )
    ours = GPT2ReproForCausalLM.from_pretrained(checkpoint)
    ids = AutoTokenizer.from_pretrained(checkpoint)("Return the length of", return_tensors="pt").input_ids
    for step in answer["choices"][0]["logprobs"]["content"]:
        with torch.no_grad():
            expected = ours(ids).logits[0, -1].log_softmax(-1)
        assert step["id"] == expected.argmax()
        for token in step["top_logprobs"]:
            assert math.isclose(
                token["logprob"], expected[token["id"]], abs_tol=5e-3
            )  # its GELU is a half-precision table
        ids = torch.cat([ids, torch.tensor([[step["id"]]])], dim=1)


def test_what_would_not_run_the_same_is_refused_and_nothing_is_overwritten(checkpoint, tmp_path, capsys):
    (tmp_path / "mine.gguf").write_text("mine")
    assert main([str(checkpoint), str(tmp_path / "mine.gguf")]) == 1
    assert "mine.gguf exists" in capsys.readouterr().err
    assert (tmp_path / "mine.gguf").read_text() == "mine"
    with pytest.raises(ValueError, match="no checkpoint loads from"):
        write_gguf(tmp_path / "nowhere", tmp_path / "new.gguf")
    model = GPT2ReproForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model.config.activation_function = "relu"
    model.save_pretrained(tmp_path / "relu")
    with pytest.raises(ValueError, match="activation_function is relu"):
        write_gguf(tmp_path / "relu", tmp_path / "new.gguf")
    model.config.activation_function = "gelu_new"
    model.save_pretrained(tmp_path / "other")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="not GPT-2's byte-level BPE"):
        write_gguf(tmp_path / "other", tmp_path / "new.gguf")
    assert not list(tmp_path.glob("*new.gguf*"))


def test_a_missing_package_is_one_line(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main([str(checkpoint), str(tmp_path / "new.gguf")]) == 1
    assert capsys.readouterr().err == "error: the package gguf is missing: pip install gguf\n"
