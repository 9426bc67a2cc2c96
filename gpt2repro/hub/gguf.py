"""Export a checkpoint as one GGUF file, for llama.cpp and the programs built on it.

    python -m gpt2repro.hub.gguf runs/demo/latest demo.gguf            # extra `gguf`

CHECKPOINT is a folder or Hub id of this project's model or of stock GPT-2, with its tokenizer. All tensors are
float32; keys and tensor names are those of llama.cpp's architecture "gpt2", whose matrices are (out, in) as ours.
Transformers reads the file too, but takes the positions from its own default of 1024 unless it is told them:

    GPT2LMHeadModel.from_pretrained(folder, gguf_file="demo.gguf", n_positions=256)
"""

from gpt2repro import command
from gpt2repro.hub import flags

if command.starting(__name__):
    command.parse_early(lambda: flags.gguf(__doc__, None))

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import pre_tokenizers

from gpt2repro.hub.convert import load_as_gpt2repro
from gpt2repro.hub.loading import load_tokenizer

# llama.cpp's "gpt-2" pre-tokenizer; whether the offsets trim spaces changes no token.
GPT2_PRE_TOKENIZER = json.loads(pre_tokenizers.ByteLevel(add_prefix_space=False).__getstate__())


def write_gguf(checkpoint: str | Path, file: str | Path, *, verify: bool = True) -> int:
    """Write `file`, whole or not at all; returns the number of its tensors.

    Raises:
        ValueError: the package `gguf` is missing; no checkpoint there; `file` exists; or llama.cpp's GPT-2 computes
            something else (its GELU is the tanh approximation, its tokenizer GPT-2's byte-level BPE).
    """
    try:
        import gguf
    except ImportError:
        raise ValueError("the package gguf is missing: pip install gguf") from None
    file = Path(file)
    if file.exists():
        raise ValueError(f"{file} exists: give another name, or remove it first")
    model = load_as_gpt2repro(checkpoint, verify=verify)
    config = model.config
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"activation_function is {config.activation_function}: llama.cpp's GPT-2 has only gelu_new")
    writer = gguf.GGUFWriter(path=None, arch="gpt2")
    writer.add_name(file.stem)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, checkpoint, rows=config.vocab_size)
    names: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    tensors = model.state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # a reader takes the embedding instead
    for name, tensor in tensors.items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    with TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as aside:
        writer.write_header_to_file(Path(aside) / file.name)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(Path(aside) / file.name, file)
    return len(tensors)


def _add_tokenizer(writer, checkpoint: str | Path, *, rows: int) -> None:
    """Tokens, their types, merges and special ids; embedding rows without a token become unused tokens."""
    from gguf import SpecialVocab, TokenType

    with TemporaryDirectory() as folder:
        load_tokenizer(checkpoint).save_pretrained(folder)
        saved = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
        special = SpecialVocab(folder, load_merges=True, n_vocab=rows)
    splits = {**(saved["pre_tokenizer"] or {}), "trim_offsets": GPT2_PRE_TOKENIZER["trim_offsets"]}
    if saved["model"]["type"] != "BPE" or splits != GPT2_PRE_TOKENIZER or saved["normalizer"]:
        raise ValueError(f"the tokenizer of {checkpoint} is not GPT-2's byte-level BPE, which llama.cpp expects")
    tokens = [(f"[PAD{row}]", TokenType.UNUSED) for row in range(rows)]
    for token, row in saved["model"]["vocab"].items():
        tokens[row] = (token, TokenType.NORMAL)
    for added in saved["added_tokens"]:
        tokens[added["id"]] = (added["content"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    special.add_to_gguf(writer, quiet=True)


def main(argv: list[str] | None = None) -> int:
    args = flags.gguf(__doc__, argv)

    def work() -> None:
        count = write_gguf(args.checkpoint, args.file, verify=args.verify)
        print(f"{args.file}: {count} float32 tensors, {args.file.stat().st_size:,} bytes")

    return command.run(work, errors_only=True)


if __name__ == "__main__":
    sys.exit(main())
