"""A tiny stock GPT-2, its conversion to this project's model, and that one as a checkpoint."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2repro.hub.convert import from_stock

SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 64, "vocab_size": 128}


@pytest.fixture(scope="session")
def pair():
    """Random weights, large enough that predictions differ from token to token; no token ends a text."""
    torch.manual_seed(0)
    config = GPT2Config(**SHAPE, bos_token_id=0, eos_token_id=None, pad_token_id=0, initializer_range=0.2)
    stock = GPT2LMHeadModel(config).eval()
    return stock, from_stock(stock)


@pytest.fixture
def ours(pair):
    """A model of its own for a test that changes it."""
    return from_stock(pair[0])


@pytest.fixture(scope="session")
def checkpoint(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    pair[1].save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ids():
    return torch.randint(1, SHAPE["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(1))
