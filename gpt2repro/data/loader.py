"""Batches: windows of a token stream as (micro_batch_size, seq_len) tensors on the device, prefetched by a thread.

    loader = TrainLoader(stream, order, sequences_per_step=512, micro_batch_size=16, rank=0, world_size=8,
                         vocab_size=50257)
    batches = loader.batches(first_step=1000)       # a resumed run passes its step, nothing else
    model(**next(batches))                          # input_ids, and as shift_labels the next tokens

The global batch of a step is the same windows in the same order for every world size and micro-batch. A thread and not
worker processes: reading is far faster than training, and processes outlive a killed run.
"""

import itertools
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch

from gpt2repro.data.mixture import Order, Stream
from gpt2repro.data.stream import TokenStream

PREFETCH = 4  # micro-batches: one hides the reading, the others hide a slow disk
IGNORED = -100  # the target that cross_entropy skips

Batch = dict[str, torch.Tensor]  # what the model takes, by the names of its arguments


@dataclass(frozen=True)
class Documents:
    """Keeps the documents of a window apart: a document begins with <|endoftext|>, or with the window."""

    eot_id: int
    restart: bool  # positions begin at 0 in every document, else they run on over the window

    def of(self, input_ids: torch.Tensor) -> Batch:
        """What tells the model the documents of (B, T) ids: the number of each token's, or positions that restart."""
        begins = input_ids == self.eot_id
        if not self.restart:
            return {"seq_idx": begins.cumsum(1)}
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return {"position_ids": places - (begins * places).cummax(1).values}


@dataclass
class TrainLoader:
    """The micro-batches of one rank. accumulation = sequences_per_step / (micro_batch_size * world_size)."""

    stream: Stream
    order: Order
    _: KW_ONLY
    sequences_per_step: int
    micro_batch_size: int
    vocab_size: int
    documents: Documents | None = None
    rank: int = 0
    world_size: int = 1
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        per_micro_step = self.micro_batch_size * self.world_size
        if per_micro_step < 1 or self.sequences_per_step < 1 or self.sequences_per_step % per_micro_step:
            batches = f"micro batches of {self.micro_batch_size} on {self.world_size} processes"
            advice = f"a multiple of {per_micro_step} does"
            raise ValueError(f"{self.sequences_per_step} sequences a step do not divide into {batches}: {advice}")
        self.accumulation = self.sequences_per_step // per_micro_step

    def window_starts(self, step: int) -> np.ndarray:
        """Stream offsets of the whole global batch of `step`, of all ranks: (sequences_per_step,) int64."""
        return self.order.starts(step * self.sequences_per_step, self.sequences_per_step)

    def batches(self, first_step: int) -> Generator[Batch, None, None]:
        """The batches from `first_step` on, without an end. Closing the generator ends its thread."""
        read = self._micro_batches(first_step)  # a generator; only the thread takes from it
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
            ready: deque[Future[torch.Tensor]] = deque(thread.submit(next, read) for _ in range(PREFETCH))
            while True:
                ready.append(thread.submit(next, read))
                yield _to_device(ready.popleft().result(), self.device, self.documents)

    def first_batch(self, first_step: int) -> Batch:
        """The first micro-batch of `first_step`, without a thread."""
        return _to_device(next(self._micro_batches(first_step)), self.device, self.documents)

    def _micro_batches(self, first_step: int) -> Iterator[torch.Tensor]:
        """Inputs and targets in host memory, (2, micro_batch_size, seq_len)."""
        pin = torch.device(self.device).type == "cuda"
        for step in itertools.count(first_step):
            # (accumulation, world_size, micro_batch_size): micro-step m of rank r is row (m, r)
            starts = self.window_starts(step).reshape(self.accumulation, self.world_size, self.micro_batch_size)
            for micro_starts in starts[:, self.rank]:
                batch = torch.from_numpy(_windows(self.stream, micro_starts, self.order.seq_len, self.vocab_size))
                yield batch.pin_memory() if pin else batch


def validation_tokens(stream: TokenStream, seq_len: int, max_tokens: int) -> int:
    """The number of targets that `validation_batches` yields over all ranks: whole windows within max_tokens."""
    windows = min(max_tokens, stream.tokens - 1) // seq_len
    if windows < 1:
        available = f"{stream.tokens:,} validation tokens and at most {max_tokens:,} of them asked for"
        needed = f"one takes seq_len + 1 = {seq_len + 1:,}"
        raise ValueError(f"no validation window: {available}, but {needed}; prepare or ask for more")
    return windows * seq_len


def validation_batches(
    stream: TokenStream, *, seq_len: int, max_tokens: int, micro_batch_size: int, vocab_size: int, rank: int = 0,
    documents: Documents | None = None, world_size: int = 1, device: str | torch.device = "cpu",
) -> Iterator[Batch]:
    """The first windows of the stream, in its order, split over the ranks; the same set for every world size.

    Every batch has the full shape and every rank the same number of them: missing windows are targets of -100.
    """
    windows = validation_tokens(stream, seq_len, max_tokens) // seq_len
    starts = np.arange(windows, dtype=np.int64) * seq_len
    for first in range(rank * micro_batch_size, windows + rank * micro_batch_size, micro_batch_size * world_size):
        micro_starts = starts[first : first + micro_batch_size]
        batch = np.zeros((2, micro_batch_size, seq_len), dtype=np.int64)
        batch[1] = IGNORED
        batch[:, : len(micro_starts)] = _windows(stream, micro_starts, seq_len, vocab_size)
        yield _to_device(torch.from_numpy(batch), device, documents)


def _windows(stream: Stream, starts: np.ndarray, seq_len: int, vocab_size: int) -> np.ndarray:
    """The windows at `starts`: inputs and next tokens, (2, len(starts), seq_len) int64.

    Raises ValueError for an id past the vocabulary (on a GPU it would be an unreadable device-side assert).
    """
    ids = np.empty((len(starts), seq_len + 1), dtype=stream.dtype)
    for row, start in enumerate(starts.tolist()):
        ids[row] = stream.read(start, seq_len + 1)
    if ids.max(initial=0) >= vocab_size:
        row, column = np.argwhere(ids >= vocab_size)[0]
        shard, index = stream.locate(int(starts[row]), int(column))
        where = f"token id {ids[row, column]:,} at position {index:,} of {shard.path}"
        advice = "the shards were made with another tokenizer, or are damaged: prepare with the model's, or verify"
        raise ValueError(f"{where} is past vocab_size {vocab_size:,}; {advice}")
    return np.stack([ids[:, :-1], ids[:, 1:]], dtype=np.int64)


def _to_device(batch: torch.Tensor, device: str | torch.device, documents: Documents | None) -> Batch:
    input_ids, targets = batch.to(device, non_blocking=batch.is_pinned()).unbind(0)
    return {"input_ids": input_ids, "shift_labels": targets, **(documents.of(input_ids) if documents else {})}
