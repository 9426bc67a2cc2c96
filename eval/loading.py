"""A model and its tokenizer for evaluation, and how a command of this folder ends.

    model, tokenizer = load_model("runs/demo/latest")         # or "openai-community/gpt2", or any causal LM

A checkpoint of this project loads through the classes of this checkout, so nobody has to trust the code that lies
beside its weights. Foreign code runs only with `trust_remote_code=True`.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_gpt2repro  # noqa: F401 (the import registers our classes with the Auto classes)
from gpt2repro import command

# An embedding has a few more rows than its tokenizer has tokens where it was padded for speed (GPT-2: 50304 for 50257;
# published models: up to 905). More than that is another tokenizer.
MAX_PADDED_ROWS = 1024
DTYPES = ("float32", "bfloat16", "float16")


def load_model(
    name: str,
    *,
    tokenizer: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
):
    """The causal LM at `name` (a folder or a Hub id) in evaluation mode, and its tokenizer.

    Raises:
        ValueError: no such folder, no checkpoint in it, or a tokenizer that does not fit the model's vocabulary.
        OSError: nothing to load under that name.
    """
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):  # no Hub id looks so
        raise ValueError(
            f"there is no folder {name}: give a checkpoint folder, or a Hub id such as openai-community/gpt2"
        )
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name} holds no config.json: give a checkpoint folder, e.g. {name}/latest")
    # An explicit False: without a value the library would ask the person at the terminal.
    trust = {"trust_remote_code": trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), **trust)
    loaded_tokenizer = AutoTokenizer.from_pretrained(tokenizer or name, **trust)
    check_vocabulary(model, loaded_tokenizer)
    return model.to(device or best_device()).eval(), loaded_tokenizer


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


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


def model_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every command with a model has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id of a causal language model")
    parser.add_argument("--tokenizer", help="folder or Hub id, where the tokenizer does not lie beside the model")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights (default: %(default)s)")
    parser.add_argument("--device", default=best_device(), help="cpu, cuda, cuda:1, … (default: %(default)s)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that lies beside the weights")
    return parser


def load_from(arguments: argparse.Namespace):
    """`load_model` with what `model_parser` parsed."""
    options = ("tokenizer", "dtype", "device", "trust_remote_code")
    return load_model(arguments.model, **{name: getattr(arguments, name) for name in options})


def output_file(path: str | Path) -> Path:
    """The path of a file that a command is about to write: its folder made, and said on standard output."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    print(f"writing {path}")
    return Path(path)


def write_json(path: str | Path, value: dict) -> None:
    """One JSON object, readable by people, folders made as needed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def run_command(main: Callable[[], None]) -> None:
    """Run a command and exit with its code."""
    raise SystemExit(command.run(main))
