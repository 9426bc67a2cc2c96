"""Stock GPT-2 <-> GPT2Repro, both ways and lossless; checkpoints of nanoGPT and build-nanogpt in.

    python -m gpt2repro.hub.convert openai-community/gpt2 gpt2-repro --to gpt2repro
    python -m gpt2repro.hub.convert runs/demo/latest demo-stock --to gpt2
    python -m gpt2repro.hub.convert out/ckpt.pt gpt2-nano --to gpt2 --tokenizer openai-community/gpt2

DST is a complete checkpoint with its tokenizer, written aside and renamed. The only bytes that change are those of
four weights a layer, which stock GPT-2 keeps transposed (its `Conv1D` is a linear layer of shape (in, out)). Pickles
(.bin, .pt) are read as weights only: code in one is refused, not run.
"""

import argparse
import os
import pickle
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro import command
from gpt2repro.hub.upload import hub_is_reachable
from gpt2repro.recipe import Recipe
from modeling_gpt2repro import GPT2ReproForCausalLM

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # what older files keep beside the weights
SHARED_FIELDS = (
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "resid_pdrop",
    "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "initializer_range", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "tie_word_embeddings", "dtype",
)  # fmt: skip
# Stock options that change the function; GPT2Repro has only what the released models use.
REQUIRED_OF_STOCK = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
# What the libraries raise at a file that is missing, damaged, or not what it is taken for.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, EOFError, LookupError, TypeError, AttributeError,
                  pickle.UnpicklingError, SafetensorError)  # fmt: skip
GPT2_TOKENS, GPT2_ROWS, MAX_PADDING = 50257, 50304, 128  # rows are tokens padded to a multiple of 64 or 128


def from_stock(stock: GPT2LMHeadModel) -> GPT2ReproForCausalLM:
    """The same network as a GPT2Repro model, in evaluation mode.

    Raises:
        ValueError: the stock model uses an option that the released GPT-2s do not.
    """
    for name, required in REQUIRED_OF_STOCK.items():
        if getattr(stock.config, name) != required:
            raise ValueError(f"the stock model has {name}={getattr(stock.config, name)}: only {required} converts")
    config = GPT2ReproConfig(**{name: getattr(stock.config, name) for name in SHARED_FIELDS})
    return _fill(GPT2ReproForCausalLM, config, stock)


def to_stock(model: GPT2ReproForCausalLM) -> GPT2LMHeadModel:
    """The same network as a stock `GPT2LMHeadModel`, in evaluation mode; it loads anywhere without our code."""
    fields = {name: getattr(model.config, name) for name in SHARED_FIELDS}
    fields["n_ctx"] = model.config.n_positions  # the older name that llama.cpp's converter reads
    return _fill(GPT2LMHeadModel, GPT2Config(**fields), model)


def load_as_gpt2repro(
    source: str | Path, *, dtype: torch.dtype | str = torch.float32, vocab_size: int | None = None
) -> GPT2ReproForCausalLM:
    """A checkpoint of any kind as a GPT2Repro model: folder or Hub id, ours or stock, or a .pt file.

    dtype "auto" is that of its tensors. `vocab_size` is how many rows of a .pt file's padded embedding are tokens
    (None: 50257 of 50304, else all); other checkpoints keep theirs.

    Raises:
        ValueError: no checkpoint there, one of another architecture, tensors that are missing, left over or of
            another shape, a damaged file, or a pickle with more than tensors in it.
    """
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model_class: Any = GPT2ReproForCausalLM
    if str(source).endswith(".pt"):
        config, state = _read_pt(Path(source), vocab_size)
        model, info = model_class.from_pretrained(None, config=config, state_dict=state, **options)
    else:
        kind = _load(AutoConfig, source).model_type
        if kind not in ("gpt2", "gpt2repro"):
            raise ValueError(f"{source} holds a {kind} model: expected gpt2 or gpt2repro")
        if kind == "gpt2":
            model_class = GPT2LMHeadModel
        model, info = _load(model_class, source, **options)
    _check_tensors(source, info)
    return from_stock(model) if isinstance(model, GPT2LMHeadModel) else model


def initial_model(recipe: Recipe, *, vocab_size: int, eot_id: int) -> GPT2ReproForCausalLM:
    """The network that a run begins with: new from the recipe's seed, or with the weights of `init_from`.

    Raises:
        ValueError: weights that cannot be loaded, or are of another shape.
    """
    config = GPT2ReproConfig(
        **recipe.shape(), vocab_size=vocab_size, bos_token_id=eot_id, eos_token_id=eot_id,
        resid_pdrop=recipe.dropout, embd_pdrop=recipe.dropout, attn_pdrop=recipe.dropout,
    )  # fmt: skip
    torch.manual_seed(recipe.seed)
    if recipe.init_from:
        model = load_as_gpt2repro(recipe.init_from, vocab_size=vocab_size)
        fit_to_recipe(recipe, model, config)
    else:
        model = GPT2ReproForCausalLM(config)
    model.set_attn_implementation(recipe.attn_implementation)
    if recipe.gradient_checkpointing:
        recompute_activations(model)
    return model


def fit_to_recipe(recipe: Recipe, model: GPT2ReproForCausalLM, wanted: GPT2ReproConfig) -> None:
    """Refuse weights of another shape than the recipe's, and give the model the recipe's dropout."""
    found = model.config
    names = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    wrong = [f"{n} is {getattr(found, n)} there, {getattr(wanted, n)} here" for n in names
             if getattr(found, n) != getattr(wanted, n)]  # fmt: skip
    if wrong:
        raise ValueError(f"init_from {recipe.init_from} is of another shape: {'; '.join(wrong)}")
    found.resid_pdrop = found.embd_pdrop = found.attn_pdrop = recipe.dropout
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # made with the checkpoint's
            module.p = recipe.dropout


def recompute_activations(model: Any) -> None:
    """Turn gradient checkpointing on, by the name that this release of Transformers has for it."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer at a folder or Hub id.

    Raises:
        ValueError: there is none, or nothing but an empty one that the library made up from the configuration.
    """
    found = _load(AutoTokenizer, source, what="tokenizer")
    if len(found) < 2:
        raise ValueError(f"{source} holds no tokenizer: name it with --tokenizer DIR_OR_ID")
    return found


def _load(loader: Any, source: str | Path, *, what: str = "checkpoint", **options: Any) -> Any:
    """`loader.from_pretrained(source)`; where the Hub does not answer a Hub id comes from the cache, or not at all."""
    offline = False
    try:
        if not Path(source).is_dir():
            validate_repo_id(str(source))
            offline = not hub_is_reachable()
        return loader.from_pretrained(source, local_files_only=offline, **options)
    except LOADING_ERRORS as error:
        why = f"the Hub does not answer at {constants.ENDPOINT}" if offline else _short(error)
        raise ValueError(f"no {what} loads from {str(source)!r}: give a folder or a Hub id ({why})") from error


def _read_pt(file: Path, vocab_size: int | None) -> tuple[GPT2ReproConfig, dict[str, torch.Tensor]]:
    """What nanoGPT's train.py or build-nanogpt's train_gpt2.py saved. Their linear layers are stored as ours are."""
    # build-nanogpt pickles its configuration as an object of its script's class; a bare object stands in for it.
    stand_ins: list = [(SimpleNamespace, f"{module}.GPTConfig") for module in ("__main__", "train_gpt2", "model")]
    try:
        with torch.serialization.safe_globals(stand_ins):
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        named = {name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()}
        state = {name: tensor.clone() for name, tensor in named.items() if not name.endswith(CAUSAL_MASKS)}
        settings = saved["model_args"] if "model_args" in saved else vars(saved["config"])
        sizes = {name: settings[name] for name in ("n_layer", "n_head", "n_embd")}
        wte, n_positions = state["transformer.wte.weight"], settings["block_size"]
    except LOADING_ERRORS as error:
        raise ValueError(
            f"{file} is no checkpoint of nanoGPT or build-nanogpt ({type(error).__name__}: {_short(error)})"
        ) from error
    tokens = vocab_size or (GPT2_TOKENS if len(wte) == GPT2_ROWS else len(wte))
    if not tokens <= len(wte) < tokens + MAX_PADDING:
        raise ValueError(f"{file} embeds {len(wte)} ids, the tokenizer has {tokens}: give the one it was trained with")
    if not torch.equal(state.setdefault("lm_head.weight", wte), wte):
        raise ValueError(f"{file} has a head of its own: expected it tied to transformer.wte.weight")
    state["transformer.wte.weight"] = state["lm_head.weight"] = wte[:tokens]
    # nanoGPT's GELU is the exact one, build-nanogpt's the tanh approximation of GPT-2.
    activation = "gelu" if "model_args" in saved else "gelu_new"
    end = GPT2_TOKENS - 1 if tokens == GPT2_TOKENS else None
    config = GPT2ReproConfig(
        **sizes, n_positions=n_positions, vocab_size=tokens, activation_function=activation, bos_token_id=end,
        eos_token_id=end, dtype=wte.dtype,
    )  # fmt: skip
    if not settings.get("bias", True):  # no bias is the same function as a bias of zero
        for name in [name for name in state if name.startswith(("transformer.h.", "transformer.ln_f."))]:
            state[name.replace(".weight", ".bias")] = torch.zeros(len(state[name]), dtype=wte.dtype)
        print(f"{file} was trained with bias=False: its biases are zeros", file=sys.stderr)
    return config, state


def _check_tensors(source: str | Path, info: dict[str, set]) -> None:
    """Name what is wrong with a checkpoint's tensors; the library would fill what is missing with random numbers."""
    problems = {
        "missing": info["missing_keys"],
        "unexpected": {name for name in info["unexpected_keys"] if not name.endswith(CAUSAL_MASKS)},
        "wrong shape": {f"{name} {list(found)}" for name, found, _ in info["mismatched_keys"]},
    }
    found = [f"{what}: {', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''}"
             for what, names in problems.items() if names]  # fmt: skip
    if found:
        raise ValueError(f"the tensors of {source} are not those of its configuration ({'; '.join(found)})")


def _short(error: Exception) -> str:
    """An error on a line; of a refused pickle what it asked for, without PyTorch's advice to run it all the same."""
    if asked_for := re.search(r"GLOBAL (\S+)", str(error)):
        return f"the pickle asks for {asked_for[1]}, which no weights need; nothing of it was run"
    return " ".join(str(error).split("WeightsUnpickler error:")[-1].split())[:300]


def _fill(target_class, config, source):
    """A `target_class` of `config` with the tensors of `source`, four a layer transposed."""
    state = {
        name: tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor.clone()
        for name, tensor in source.state_dict().items()
    }
    with torch.device("meta"):
        target = target_class(config)
    target.load_state_dict(state, assign=True)
    target.tie_weights()
    target.generation_config = source.generation_config
    return target.eval()


def convert(source: str | Path, folder: str | Path, *, to: str, tokenizer: str | None = None) -> int:
    """Make `folder` a complete checkpoint of kind `to` (gpt2 or gpt2repro); returns its number of parameters.

    Raises:
        ValueError: what `load_as_gpt2repro` refuses, no tokenizer, or a folder that holds something already.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: give a new folder")
    is_pt = str(source).endswith(".pt")
    if is_pt and not tokenizer:
        raise ValueError(f"{source} carries no tokenizer: name it, e.g. --tokenizer openai-community/gpt2")
    words = load_tokenizer(tokenizer or source)
    model = load_as_gpt2repro(source, dtype="auto", vocab_size=len(words))
    if len(words) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(words)} entries, the model {model.config.vocab_size}: name its own")
    if is_pt:
        for settings in (model.config, model.generation_config):
            settings.bos_token_id = settings.eos_token_id = words.eos_token_id
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        whole = Path(aside) / folder.name
        (to_stock(model) if to == "gpt2" else model).save_pretrained(whole)
        words.save_pretrained(whole)
        for file in whole.iterdir():
            file.chmod((whole / "config.json").stat().st_mode)  # safetensors writes 0600
        os.replace(whole, folder)
    return model.num_parameters()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Convert a checkpoint between stock GPT-2 and GPT2Repro.")
    parser.add_argument("src", help="folder, Hub id, or the .pt file of nanoGPT or build-nanogpt")
    parser.add_argument("dst", type=Path, help="folder to make")
    parser.add_argument("--to", choices=("gpt2", "gpt2repro"), required=True)
    parser.add_argument("--tokenizer", metavar="DIR_OR_ID", help="where none lies beside the weights, as for .pt")
    args = parser.parse_args(argv)

    def work() -> None:
        parameters = convert(args.src, args.dst, to=args.to, tokenizer=args.tokenizer)
        print(f"{args.dst}: {args.to}, {parameters:,} parameters")

    return command.run(work, errors_only=True)


if __name__ == "__main__":
    sys.exit(main())
