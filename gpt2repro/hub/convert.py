"""Conversion between stock GPT-2 and GPT2Repro, lossless both ways; also from nanoGPT and build-nanogpt.

    python -m gpt2repro.hub.convert openai-community/gpt2 gpt2-repro --to gpt2repro
    python -m gpt2repro.hub.convert runs/demo/latest demo-stock --to gpt2
    python -m gpt2repro.hub.convert out/ckpt.pt gpt2-nano --to gpt2 --tokenizer openai-community/gpt2

DST becomes a complete checkpoint with its tokenizer, written whole or not at all. The only bytes that change are those
of four weights a layer, which stock GPT-2 keeps transposed (its `Conv1D` is a linear layer of shape (in, out)).
"""

from gpt2repro import command
from gpt2repro.hub import flags

if command.starting(__name__):
    command.parse_early(lambda: flags.convert(__doc__, None))

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.hub.card import terms_of
from gpt2repro.hub.loading import (
    base_of_adapter,
    check_weights,
    from_pretrained,
    load_tokenizer,
    refuse_damage,
    with_adapter,
)
from gpt2repro.hub.nanogpt import character_tokenizer, read_pt
from modeling_gpt2repro import GPT2ReproForCausalLM

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SHARED_FIELDS = (
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "resid_pdrop",
    "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "initializer_range", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "tie_word_embeddings", "dtype",
)
# Stock options that change the function. GPT2Repro has only what the released models use, the defaults.
DEFAULT_IN_STOCK = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention")


def from_stock(stock: GPT2LMHeadModel) -> GPT2ReproForCausalLM:
    """The same network as a GPT2Repro model, in evaluation mode.

    Raises:
        ValueError: the stock model uses an option that the released GPT-2s do not.
    """
    for name in DEFAULT_IN_STOCK:
        value, default = getattr(stock.config, name), getattr(GPT2Config(), name)
        if value != default:
            raise ValueError(f"the stock model has {name}={value}: only {default} converts")
    config = GPT2ReproConfig(**{name: getattr(stock.config, name) for name in SHARED_FIELDS})
    return _fill(GPT2ReproForCausalLM, config, stock)


def to_stock(model: GPT2ReproForCausalLM) -> GPT2LMHeadModel:
    """The same network as a stock `GPT2LMHeadModel`, in evaluation mode; it loads anywhere without our code."""
    fields = {name: getattr(model.config, name) for name in SHARED_FIELDS}
    fields["n_ctx"] = model.config.n_positions  # the older name that llama.cpp's converter reads
    return _fill(GPT2LMHeadModel, GPT2Config(**fields), model)


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


def config_of(source: str | Path) -> GPT2Config | GPT2ReproConfig:
    """The configuration of a checkpoint of any kind that `load_as_gpt2repro` takes; ValueError for any other."""
    if str(source).endswith(".pt"):
        return read_pt(Path(source))[0]
    config = from_pretrained(AutoConfig, base_of_adapter(source) or source)
    if config.model_type not in ("gpt2", "gpt2repro"):
        raise ValueError(f"{source} holds a {config.model_type} model: expected gpt2 or gpt2repro")
    return config


def load_as_gpt2repro(
    source: str | Path, *, dtype: torch.dtype | str = torch.float32, vocab_size: int | None = None, verify: bool = True
) -> GPT2ReproForCausalLM:
    """A checkpoint of any kind as a GPT2Repro model: folder or Hub id, ours or stock, or a .pt file.

    A folder with a LoRA adapter is its base model with the adapter merged into the weights.

    dtype "auto" is that of its tensors. `vocab_size` is how many rows of a .pt file's padded embedding are tokens
    (None: 50257 of 50304, else all); other checkpoints keep theirs. `verify` compares the files of a run's checkpoint
    with its record.

    Raises:
        ValueError: no checkpoint there, one of another architecture, tensors that are missing, unexpected, of another
            shape or not finite, a damaged file, or a pickle with more than tensors in it.
    """
    if verify:
        refuse_damage(source)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model_class: Any = GPT2ReproForCausalLM
    if str(source).endswith(".pt"):
        config, state = read_pt(Path(source), vocab_size=vocab_size)
        model, info = model_class.from_pretrained(None, config=config, state_dict=state, **options)
    else:
        if config_of(source).model_type == "gpt2":
            model_class = GPT2LMHeadModel
        model, info = from_pretrained(model_class, base_of_adapter(source) or source, **options)
    check_weights(source, model, info)
    if base_of_adapter(source):
        model = with_adapter(model, source)
    # The library keeps an untied head that a file holds, also where the configuration says that it is tied.
    model.config.tie_word_embeddings = model.lm_head.weight is model.transformer.wte.weight
    return from_stock(model) if isinstance(model, GPT2LMHeadModel) else model


def set_end_of_text(model: GPT2ReproForCausalLM, token_id: int) -> None:
    """Make `token_id` the token before and after every text."""
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = settings.eos_token_id = token_id


def convert(
    source: str | Path, folder: str | Path, *, to: str, tokenizer: str | None = None, verify: bool = True
) -> int:
    """Make `folder` a complete checkpoint of kind `to` (gpt2 or gpt2repro); returns its number of parameters.

    Raises:
        ValueError: what `load_as_gpt2repro` refuses, no tokenizer, or a folder that is not empty.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: give a new folder")
    is_pt = str(source).endswith(".pt")
    if is_pt and not tokenizer:
        advice = "--tokenizer openai-community/gpt2, or nanoGPT's meta.pkl"
        raise ValueError(f"{source} carries no tokenizer: name it, e.g. {advice}")
    vocabulary = (character_tokenizer if str(tokenizer).endswith(".pkl") else load_tokenizer)(tokenizer or source)
    model = load_as_gpt2repro(source, dtype="auto", vocab_size=len(vocabulary), verify=verify)
    if len(vocabulary) > (rows := model.config.vocab_size):
        raise ValueError(f"the tokenizer has {len(vocabulary)} entries, the model {rows}: name its own")
    if is_pt:
        set_end_of_text(model, vocabulary.eos_token_id)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        whole = Path(aside) / folder.name
        (to_stock(model) if to == "gpt2" else model).save_pretrained(whole)
        vocabulary.model_max_length = model.config.n_positions  # what truncation=True keeps
        vocabulary.save_pretrained(whole)
        if terms := terms_of(source):  # for the model card that publish writes
            ModelCard(f"---\n{ModelCardData(**terms).to_yaml()}\n---\n").save(whole / "README.md")
        for file in whole.iterdir():
            file.chmod((whole / "config.json").stat().st_mode)  # safetensors writes 0600
        os.replace(whole, folder)
    return model.num_parameters()


def main(argv: list[str] | None = None) -> int:
    args = flags.convert(__doc__, argv)

    def work() -> None:
        parameters = convert(args.src, args.dst, to=args.to, tokenizer=args.tokenizer, verify=args.verify)
        print(f"{args.dst}: {args.to}, {parameters:,} parameters")

    return command.run(work, errors_only=True)


if __name__ == "__main__":
    sys.exit(main())
