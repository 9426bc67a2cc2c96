"""The .pt checkpoints of nanoGPT (train.py) and build-nanogpt (train_gpt2.py).

Their state-dict keys are GPT-2's, and their linear layers have the shape of ours. nanoGPT's GELU is the exact one,
build-nanogpt's is the tanh approximation of GPT-2.
"""

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.hub.loading import CAUSAL_MASKS, reason

GPT2_TOKENS, GPT2_ROWS, MAX_PADDING = 50257, 50304, 128  # rows are tokens padded to a multiple of 64 or 128


def read_pt(file: Path, *, vocab_size: int | None = None) -> tuple[GPT2ReproConfig, dict[str, torch.Tensor]]:
    """The configuration and the state dict of a .pt file, without the rows that pad the vocabulary.

    The pickle is read as weights only: code in it is refused, not run.

    Raises:
        ValueError: another kind of file, a vocabulary of another size, or an untied head.
    """
    # build-nanogpt pickles its configuration as an object of its script's class; a bare object takes its place.
    stand_ins: list = [(SimpleNamespace, f"{module}.GPTConfig") for module in ("__main__", "train_gpt2", "model")]
    try:
        with torch.serialization.safe_globals(stand_ins):
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        named = {name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()}
        state = {name: tensor.clone() for name, tensor in named.items() if not name.endswith(CAUSAL_MASKS)}
        is_nanogpt = "model_args" in saved
        settings = saved["model_args"] if is_nanogpt else vars(saved["config"])
        sizes = {name: settings[name] for name in ("n_layer", "n_head", "n_embd")}
        wte, n_positions = state["transformer.wte.weight"], settings["block_size"]
    except Exception as error:  # a damaged file makes the libraries raise almost anything
        raise ValueError(f"{file} is no checkpoint of nanoGPT or build-nanogpt ({reason(error)})") from error
    tokens = vocab_size or (GPT2_TOKENS if len(wte) == GPT2_ROWS else len(wte))
    if not tokens <= len(wte) < tokens + MAX_PADDING:
        raise ValueError(f"{file} embeds {len(wte)} ids, the tokenizer has {tokens}: give the one it was trained with")
    if not torch.equal(state.setdefault("lm_head.weight", wte), wte):
        raise ValueError(f"{file} has a head of its own: expected it tied to transformer.wte.weight")
    state["transformer.wte.weight"] = state["lm_head.weight"] = wte[:tokens]
    if not settings.get("bias", True):  # no bias is the same function as a bias of zero
        for name in [name for name in state if name.startswith(("transformer.h.", "transformer.ln_f."))]:
            state[name.replace(".weight", ".bias")] = torch.zeros(len(state[name]), dtype=wte.dtype)
        print(f"{file} was trained with bias=False: its biases are zeros", file=sys.stderr)
    end_of_text = GPT2_TOKENS - 1 if tokens == GPT2_TOKENS else None
    config = GPT2ReproConfig(
        **sizes, n_positions=n_positions, vocab_size=tokens, activation_function="gelu" if is_nanogpt else "gelu_new",
        bos_token_id=end_of_text, eos_token_id=end_of_text, dtype=wte.dtype,
    )
    return config, state


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts and their containers only (Python's documentation of pickle, "Restricting Globals")."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def character_tokenizer(meta: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of nanoGPT's character-level data sets from their meta.pkl: an id for each character.

    It has no <|endoftext|>, and a character that it does not know is an error, as in nanoGPT.

    Raises:
        ValueError: another kind of file, or a pickle with more in it than numbers and texts.
    """
    try:
        with open(meta, "rb") as file:
            vocabulary = _PlainUnpickler(file).load()["stoi"]
        tokenizer = Tokenizer(models.WordLevel(vocabulary))
    except Exception as error:  # a damaged file makes the libraries raise almost anything
        raise ValueError(f"{meta} is no meta.pkl of nanoGPT's character-level data ({reason(error)})") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
