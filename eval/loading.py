"""A model and its tokenizer for evaluation.

    model, tokenizer = load_model("runs/demo/latest")         # or "openai-community/gpt2", or any causal LM

A checkpoint of this project loads through the classes of this checkout, so nobody has to trust the code beside its
weights. Other code runs only with `trust_remote_code=True`.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_gpt2repro  # noqa: F401 (the import registers our classes with the Auto classes)
from gpt2repro.files import linked
from gpt2repro.hub.loading import base_of_adapter, check_weights, from_pretrained, refuse_damage, with_adapter
from gpt2repro.train.devices import best_device

# An embedding that was padded for speed has more rows than its tokenizer has tokens (GPT-2: 50304 for 50257; published
# models: up to 905 more). A larger difference means another tokenizer.
MAX_PADDED_ROWS = 1024


def load_model(
    name: str, *, tokenizer: str | None = None, dtype: str = "float32", device: str | None = None,
    trust_remote_code: bool = False, verify: bool = True,
):
    """The causal LM at `name` (a folder or a Hub id) in evaluation mode, and its tokenizer.

    A folder with a LoRA adapter of peft's is its base model with the adapter merged into the weights. `verify`
    compares the files of a run's checkpoint with its record.

    Raises:
        ValueError: no checkpoint there, weights that are missing or not finite, a tokenizer of another model, or a
            device that this machine lacks.
    """
    folder = linked(Path(name))
    if folder != Path(name):
        name = str(folder)
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):  # not a Hub id
        raise ValueError(
            f"there is no folder {name}: give a checkpoint folder, or a Hub id such as openai-community/gpt2"
        )
    if base := base_of_adapter(folder):
        beside = name if (folder / "tokenizer_config.json").exists() else None
        options = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "verify": verify}
        model, its_tokenizer = load_model(base, tokenizer=tokenizer or beside, **options)
        return with_adapter(model, folder).eval(), its_tokenizer
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{name} holds no config.json: give a checkpoint folder, e.g. {name}/latest")
    if verify:
        refuse_damage(folder)
    device = device or best_device()
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"the device {device} cannot be used ({str(error).splitlines()[0]}): give another") from None
    # An explicit False: without a value the library would ask the person at the terminal.
    trust = {"trust_remote_code": trust_remote_code}
    # Mismatched tensors are in the report.
    options = {"dtype": getattr(torch, dtype), "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, report = from_pretrained(AutoModelForCausalLM, name, **options, **trust)
    except ValueError as error:
        if "trust_remote_code" not in str(error.__cause__):
            raise
        raise ValueError(
            f"{name} needs the code beside its weights: read it, and give --trust-remote-code (in Python "
            "trust_remote_code=True)"
        ) from None
    check_weights(name, model, report)
    loaded_tokenizer = from_pretrained(AutoTokenizer, tokenizer or name, what="tokenizer", **trust)
    check_vocabulary(model, loaded_tokenizer)
    return model.to(device).eval(), loaded_tokenizer


def check_vocabulary(model, tokenizer) -> None:
    """Refuse a tokenizer that is not the model's.

    Raises:
        ValueError: ids without an embedding row, or so many rows without a token that the two do not belong together.
    """
    rows, tokens = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if not tokens <= rows < tokens + MAX_PADDED_ROWS:
        raise ValueError(
            f"the tokenizer has {tokens:,} tokens and the model's embedding {rows:,} rows: they do not belong "
            "together; give the tokenizer that the model was trained with (--tokenizer)"
        )


def max_positions(model) -> int:
    """The longest sequence in tokens that the model takes."""
    return model.config.max_position_embeddings


def start_token(tokenizer) -> int:
    """The token before every text: the beginning of a sequence, or where there is none the end of one.

    Raises:
        ValueError: a tokenizer with neither.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ValueError("the tokenizer has neither a bos nor an eos token to begin a text with: give another one")
    return start


def load_from(arguments: argparse.Namespace):
    """`load_model` with what `flags.model_parser` parsed."""
    options = ("tokenizer", "dtype", "device", "trust_remote_code", "verify")
    return load_model(arguments.model, **{name: getattr(arguments, name) for name in options})
