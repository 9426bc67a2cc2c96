"""Validation loss of a model on held-out text: nats per token, perplexity, bits per byte.

    python -m eval.validation --model runs/demo/latest --dataset data/shakespeare --output val.json
    python -m eval.validation --model openai-community/gpt2 --texts book.txt wiki.txt --stride 512 --output val.json

Works for every causal language model of the library, so that a baseline and a run are measured by the same code. The
JSON holds `loss`, `perplexity`, `bits_per_byte`, `tokens` and what they were measured on. For several texts these are
means in which every text has the same weight, and `texts` holds those of each.
"""

from gpt2repro import command

from . import flags

if command.starting(__name__):
    command.parse_early(lambda: flags.validation(__doc__, None))

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from gpt2repro.data.encoding import HARD_TEXT
from gpt2repro.data.loader import Batch, validation_batches
from gpt2repro.data.shards import Dataset, check_contents, open_dataset, tokenizer_sha256
from gpt2repro.data.stream import TokenStream

from .loading import load_from, max_positions, start_token
from .output import check_output, measured, write_results


@torch.no_grad()
def validation_loss(
    model, batches: Iterable[Batch], *, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    loss_impl: str = "plain",
) -> tuple[float, int]:
    """Mean loss in nats per token over `batches`, and the number of tokens that it is the mean of.

    `batches` yields `input_ids` and `shift_labels`, both (B, T) int64 on the model's device; labels are the next
    tokens, -100 where none is counted. Every token has the same weight, whatever batch it came in. `reduce` sums a
    tensor over the processes of a run, `loss_impl` is the model's. Batches of one shape let a compiled model run as it
    is: one more graph, however many rounds.

    Raises:
        ValueError: no token to count.
    """
    # Left on the device: reading one would stop the queue of kernels at every batch. A process without a share has
    # zeros to give, because the others wait for it in `reduce`.
    sums = [torch.zeros(2, device=model.device)]
    for batch in batches:
        loss = _summed_loss(model, batch, loss_impl)
        sums.append(torch.stack([loss.float(), (batch["shift_labels"] != -100).sum().float()]))
    table = torch.stack(sums)  # (batches + 1, 2)
    totals = (table if reduce else table.cpu()).double().sum(0)
    loss_sum, tokens = (reduce(totals) if reduce else totals).tolist()
    if tokens == 0:
        raise ValueError("no token to validate on: the batches were empty or all their targets -100")
    return loss_sum / tokens, int(tokens)


def _summed_loss(model, batch: Batch, loss_impl: str) -> torch.Tensor:
    """The sum of the cross-entropies of a batch, in nats."""
    if model.config.model_type == "gpt2repro":  # as in training: what fits there fits here
        options = {"num_items_in_batch": 1, "use_cache": False, "skip_logits": True, "loss_impl": loss_impl}
        return model(**batch, **options).loss
    logits = model(batch["input_ids"], use_cache=False).logits  # (B, T, V)
    # Row by row: the float32 copy of all logits at once would be the largest tensor of the whole evaluation.
    rows = zip(logits, batch["shift_labels"], strict=True)
    return sum(F.cross_entropy(row.float(), target, ignore_index=-100, reduction="sum") for row, target in rows)


def text_windows(
    ids: list[int], *, start_id: int, seq_len: int, stride: int, batch_size: int, device: str | torch.device = "cpu"
) -> Iterator[Batch]:
    """Batches that count every token of a text once, each with at least seq_len - stride tokens before it.

    The text follows `start_id`, so that its first token is predicted as well. With stride = seq_len the windows do not
    overlap; a smaller stride costs seq_len / stride times the compute and gives every token a longer past. All batches
    have the shape (batch_size, seq_len); what is missing at the end is padded and not counted.

    Raises:
        ValueError: no tokens, or a stride outside 1 … seq_len.
    """
    if not 1 <= stride <= seq_len:
        raise ValueError(f"stride is {stride}: give 1 to seq_len={seq_len}")
    if not ids:
        raise ValueError("the text has no tokens: give a text that is not empty")
    stream, columns = np.array([start_id, *ids], dtype=np.int64), np.arange(seq_len)
    windows = 1 + max(0, math.ceil((len(ids) - seq_len) / stride))
    for first in range(0, windows, batch_size):
        starts = np.arange(first, first + batch_size)[:, None] * stride
        places = starts + columns  # (batch_size, seq_len)
        # The window before counted the columns before these.
        counted = ((starts == 0) | (columns >= seq_len - stride)) & (places < len(ids))
        targets = np.where(counted, stream.take(places + 1, mode="clip"), -100)
        input_ids = stream.take(places, mode="clip")
        arrays = {"input_ids": input_ids, "shift_labels": targets}
        yield {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def bytes_per_token(tokenizer) -> np.ndarray | None:
    """How many bytes of text each id stands for, 0 for special tokens; None where ids do not tell.

    A byte-level BPE writes every byte of a token as one character of its vocabulary; added tokens are written as they
    are. A normalizer, a prefix space, or added tokens that strip spaces change the bytes of a text: a probe tells.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.decoder).__name__ != "ByteLevel":
        return None
    added, special = tokenizer.added_tokens_decoder, {*tokenizer.all_special_ids}
    lengths = np.zeros(1 + max(tokenizer.get_vocab().values()), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        if index not in special:
            lengths[index] = len(token.encode() if index in added else token)
    probe = HARD_TEXT.join(["é", *(token.content for index, token in added.items() if index not in special), ""])
    return lengths if lengths[text_ids(tokenizer, probe)].sum() == len(probe.encode()) else None


def text_ids(tokenizer, text: str) -> list[int]:
    """The ids of a text that is only text: one that spells a special token does not get it."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _dataset_loss(
    model, tokenizer, dataset: Dataset, *, seq_len: int, batch_size: int, max_tokens: int | None
) -> dict:
    """Loss, tokens and their bytes on the first windows of a dataset's validation split."""
    if tokenizer_sha256(tokenizer) != dataset.tokenizer_sha256:
        raise ValueError(
            f"{dataset.path} was prepared with another tokenizer ({dataset.vocab_size:,} tokens) than the model has "
            f"({len(tokenizer):,} tokens): prepare the same text again with the model's"
        )
    stream = check_contents(dataset, ["val"]).split("val")
    limit = stream.tokens if max_tokens is None else max_tokens
    batches = validation_batches(
        stream, seq_len=seq_len, max_tokens=limit, micro_batch_size=batch_size, vocab_size=dataset.vocab_size,
        device=model.device,
    )
    loss, tokens = validation_loss(model, batches)
    size = stream_bytes(bytes_per_token(tokenizer), stream, tokens)
    return {**loss_figures(loss, tokens, size), "tokens": tokens, "bytes": size}


def _text_loss(model, tokenizer, file: str, *, seq_len: int, batch_size: int, stride: int) -> dict:
    """Loss, tokens and bytes of a text file, whose line ends stay as they are."""
    content = Path(file).read_bytes()
    try:
        ids = text_ids(tokenizer, content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): convert it") from None
    if not ids:
        raise ValueError(f"{file} has no tokens: give a text that is not empty")
    shape = {"seq_len": seq_len, "stride": stride, "batch_size": batch_size, "start_id": start_token(tokenizer)}
    loss, tokens = validation_loss(model, text_windows(ids, device=model.device, **shape))
    size = len(content)
    return {**loss_figures(loss, tokens, size), "tokens": tokens, "bytes": size, "stride": stride}


def _measure(arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    model, tokenizer = load_from(arguments)
    seq_len = max_positions(model) if arguments.seq_len is None else arguments.seq_len
    if not 1 <= seq_len <= max_positions(model):
        raise ValueError(f"--seq-len is {seq_len}: the model takes 1 to {max_positions(model)} tokens")
    shape = {"seq_len": seq_len, "batch_size": arguments.batch_size}
    if arguments.dataset:
        # Foreign shards do not record their tokenizer.
        named = arguments.tokenizer or arguments.model
        dataset = open_dataset(arguments.dataset, format=arguments.format, tokenizer=named)
        figures = _dataset_loss(model, tokenizer, dataset, max_tokens=arguments.max_tokens, **shape)
        rows = [{"measured_on": ", ".join(arguments.dataset), **figures}]
    else:
        shape["stride"] = seq_len if arguments.stride is None else arguments.stride
        rows = [{"measured_on": file, **_text_loss(model, tokenizer, file, **shape)} for file in arguments.text]
    for row in rows:
        if not math.isfinite(row["loss"]):
            what = f"{row['measured_on']}: the loss is {row['loss']} in {arguments.dtype}"
            raise ValueError(f"{what}: give --dtype float32, or an earlier checkpoint")
    outcome = rows[0]
    if len(rows) > 1:
        outcome = {**_mean(rows), "measured_on": ", ".join(arguments.text), "texts": rows}
        rows = [*rows, {**outcome, "measured_on": "mean"}]
    for row in rows:
        bits = row["bits_per_byte"]
        print(
            f"{row['measured_on']}: loss {row['loss']:.4f}  perplexity {row['perplexity']:.2f}  bits per byte "
            f"{'not known for this tokenizer' if bits is None else f'{bits:.4f}'}  tokens {row['tokens']:,}"
        )
    if arguments.output:
        settings = {"seq_len": seq_len, **measured(model, arguments.model), "dtype": arguments.dtype}
        write_results(arguments.output, {**outcome, **settings})


def loss_figures(loss: float, tokens: int, size: float | None) -> dict[str, float | None]:
    """A loss in nats per token, with its perplexity and bits per byte; `size` bytes of text, None if not known."""
    perplexity = math.exp(min(loss, 700.0))  # finite in float64
    bits = loss * tokens / math.log(2) / size if size else None
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits}


def stream_bytes(sizes: np.ndarray | None, stream: TokenStream, tokens: int) -> int | None:
    """The bytes that the first `tokens` targets of a stream stand for, by `bytes_per_token`."""
    return None if sizes is None else int(sizes[stream.read(1, tokens)].sum())


def _mean(rows: list[dict]) -> dict:
    """The mean of the losses of several texts and of their bits per byte; every text has the same weight."""
    loss, bits = (sum(row[name] for row in rows) / len(rows) for name in ("loss", "bits_per_byte"))
    tokens = sum(row["tokens"] for row in rows)
    return {**loss_figures(loss, tokens, None), "bits_per_byte": bits, "tokens": tokens}


def main(argv: list[str] | None = None) -> int:
    arguments = flags.validation(__doc__, argv)
    return command.run(lambda: _measure(arguments))


if __name__ == "__main__":
    sys.exit(main())
