"""Stock GPT-2 <-> GPT2Repro, both ways and lossless.

    python -m gpt2repro.hub.convert openai-community/gpt2 gpt2-repro --to gpt2repro
    python -m gpt2repro.hub.convert runs/demo/latest demo-stock --to gpt2

DST is a complete checkpoint with its tokenizer. The only bytes that change are those of four weights a layer, which
stock GPT-2 keeps transposed (its `Conv1D` is a linear layer of shape (in, out)).
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from configuration_gpt2repro import GPT2ReproConfig
from modeling_gpt2repro import GPT2ReproForCausalLM

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
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
    return _fill(GPT2LMHeadModel, GPT2Config(**{name: getattr(model.config, name) for name in SHARED_FIELDS}), model)


def load_as_gpt2repro(source: str | Path, *, dtype: torch.dtype | str = torch.float32) -> GPT2ReproForCausalLM:
    """A checkpoint of either kind (folder or Hub id) as a GPT2Repro model; dtype "auto" is that of its tensors.

    Raises:
        ValueError: no checkpoint there, or one of another architecture.
    """
    try:
        kind = AutoConfig.from_pretrained(source).model_type
        if kind == "gpt2repro":
            return GPT2ReproForCausalLM.from_pretrained(source, dtype=dtype)
        if kind == "gpt2":
            return from_stock(GPT2LMHeadModel.from_pretrained(source, dtype=dtype))
    except OSError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"no checkpoint loads from {str(source)!r}: give a folder or a Hub id ({reason})") from error
    raise ValueError(f"{source} holds a {kind} model: expected gpt2 or gpt2repro")


def _fill(target_class, config, source):
    """A `target_class` of `config` with the tensors of `source`, four a layer transposed."""
    with torch.device("meta"):
        target = target_class(config)
    state = {
        name: tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor.clone()
        for name, tensor in source.state_dict().items()
    }
    target.load_state_dict(state, assign=True)
    target.tie_weights()
    target.generation_config = source.generation_config
    return target.eval()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Convert a checkpoint between stock GPT-2 and GPT2Repro.")
    parser.add_argument("src", help="folder or Hub id")
    parser.add_argument("dst", type=Path, help="folder to make")
    parser.add_argument("--to", choices=("gpt2", "gpt2repro"), required=True)
    args = parser.parse_args(argv)
    try:
        if args.dst.exists() and any(args.dst.iterdir()):
            raise ValueError(f"{args.dst} is not empty: give a new folder")
        model = load_as_gpt2repro(args.src, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(args.src)
        (to_stock(model) if args.to == "gpt2" else model).save_pretrained(args.dst)
        tokenizer.save_pretrained(args.dst)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.dst}: {args.to}, {model.num_parameters():,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
