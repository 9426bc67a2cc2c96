"""Tiny models of this project and of the library, and a byte-level tokenizer that needs no files."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from configuration_gpt2repro import GPT2ReproConfig
from modeling_gpt2repro import GPT2ReproForCausalLM

WORDS = (
    "The man holds the ball against his neck and throws it far. A woman pours milk into the bowl, then she stirs. "
    "Question: Which plant grows in water? Answer: yes no rice wheat corn moss. It's café time — “well,” they said. "
)


@pytest.fixture(scope="session")
def bpe():
    """A byte-level BPE of 400 tokens, trained on a few sentences; <|endoftext|> is its one special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([WORDS], trainer)
    special = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def gpt2_tokenizer(shared_dir):
    """GPT-2's own tokenizer."""
    return AutoTokenizer.from_pretrained(shared_dir / "gpt2_tokenizer")


def _random_model(vocab_size: int, *, n_positions: int = 64, seed: int = 0):
    """A tiny model of this project with weights large enough that its predictions differ from choice to choice."""
    torch.manual_seed(seed)
    config = GPT2ReproConfig(
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_layer=2,
        n_head=2,
        n_embd=32,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2ReproForCausalLM(config).eval()


@pytest.fixture
def fresh_model(bpe):
    """A tiny model of its own for a test that compiles it."""
    return _random_model(len(bpe))


@pytest.fixture(scope="session")
def tiny_model(bpe):
    return _random_model(len(bpe))


@pytest.fixture(scope="session")
def stock_model(bpe):
    """The library's own GPT-2, for which nothing of ours is written."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(bpe), n_positions=64, n_layer=2, n_head=2, n_embd=32, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tiny_model, bpe):
    """The tiny model and its tokenizer as a folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model.save_pretrained(folder)
    bpe.save_pretrained(folder)
    return folder
