"""Windows of a token stream -> (micro_batch_size, seq_len) tensors on the device, prefetched by a thread.

    loader = TrainLoader(stream, order, sequences_per_step=512, micro_batch_size=16, rank=0, world_size=8,
                         vocab_size=50257)
    batches = loader.batches(first_step=1000)       # resuming is this argument and nothing else
    input_ids, targets = next(batches)              # targets are the next tokens, already shifted

The global batch of a step is the same windows in the same order for every world size and micro batch. A thread rather
than worker processes: reading is far faster than training, and processes outlive a killed run.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch

from gpt2repro.data.order import WindowOrder
from gpt2repro.data.shards import TokenStream

PREFETCH = 4  # micro batches; one hides the reading, the rest hide a slow disk
IGNORED = -100  # the target that cross_entropy skips

Batch = tuple[torch.Tensor, torch.Tensor]


def _windows(stream: TokenStream, starts: np.ndarray, seq_len: int, vocab_size: int) -> np.ndarray:
    """The windows at `starts`: inputs and next tokens, (2, len(starts), seq_len) int64.

    Raises ValueError for an id past the vocabulary (on a GPU it would be an opaque device-side assert).
    """
    ids = np.empty((len(starts), seq_len + 1), dtype=stream.dtype)
    for row, start in enumerate(starts.tolist()):
        ids[row] = stream.read(start, seq_len + 1)
    if ids.max(initial=0) >= vocab_size:
        row, column = np.argwhere(ids >= vocab_size)[0]
        shard, index = stream.locate(int(starts[row]) + int(column))
        raise ValueError(
            f"token id {ids[row, column]:,} at position {index:,} of {shard.path} is past vocab_size {vocab_size:,}: "
            "the shards were made with another tokenizer, or the file is damaged; use the model's tokenizer, or "
            "verify them"
        )
    return np.stack([ids[:, :-1], ids[:, 1:]], dtype=np.int64)


@dataclass
class TrainLoader:
    """The micro batches of one rank. accumulation = sequences_per_step / (micro_batch_size * world_size)."""

    stream: TokenStream
    order: WindowOrder
    _: KW_ONLY
    sequences_per_step: int
    micro_batch_size: int
    vocab_size: int
    rank: int = 0
    world_size: int = 1
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        per_micro_step = self.micro_batch_size * self.world_size
        if per_micro_step < 1 or self.sequences_per_step < 1 or self.sequences_per_step % per_micro_step:
            raise ValueError(
                f"{self.sequences_per_step} sequences a step do not divide into micro batches of "
                f"{self.micro_batch_size} on {self.world_size} processes: a multiple of {per_micro_step} does"
            )
        self.accumulation = self.sequences_per_step // per_micro_step

    def window_starts(self, step: int) -> np.ndarray:
        """Stream offsets of the whole global batch of `step`, of all ranks: (sequences_per_step,) int64."""
        return self.order.starts(step * self.sequences_per_step, self.sequences_per_step)

    def batches(self, first_step: int) -> Iterator[Batch]:
        """(input_ids, targets) from `first_step` on, endlessly. Closing the generator ends its thread."""
        starts = self._micro_starts(first_step)  # the thread's alone: a step's order takes a millisecond
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
            ready: deque[Future[torch.Tensor]] = deque(thread.submit(self._batch, starts) for _ in range(PREFETCH))
            while True:
                ready.append(thread.submit(self._batch, starts))
                input_ids, targets = ready.popleft().result().to(self.device, non_blocking=True).unbind(0)
                yield input_ids, targets

    def first_batch(self, first_step: int) -> Batch:
        """The first micro-batch of `first_step`, without a thread."""
        input_ids, targets = self._batch(self._micro_starts(first_step)).to(self.device).unbind(0)
        return input_ids, targets

    def _micro_starts(self, first_step: int) -> Iterator[np.ndarray]:
        for step in itertools.count(first_step):
            # (accumulation, world_size, micro_batch_size): micro step m of rank r is row (m, r)
            starts = self.window_starts(step).reshape(self.accumulation, self.world_size, self.micro_batch_size)
            yield from starts[:, self.rank]

    def _batch(self, micro_starts: Iterator[np.ndarray]) -> torch.Tensor:
        batch = torch.from_numpy(_windows(self.stream, next(micro_starts), self.order.seq_len, self.vocab_size))
        return batch.pin_memory() if torch.device(self.device).type == "cuda" else batch


def validation_tokens(stream: TokenStream, seq_len: int, max_tokens: int) -> int:
    """How many targets `validation_batches` yields over all ranks: whole windows within max_tokens."""
    windows = min(max_tokens, stream.tokens - 1) // seq_len
    if windows < 1:
        raise ValueError(
            f"no validation window: {stream.tokens:,} validation tokens and at most {max_tokens:,} of them asked for, "
            f"but one takes seq_len + 1 = {seq_len + 1:,}; prepare or ask for more"
        )
    return windows * seq_len


def validation_batches(
    stream: TokenStream, *, seq_len: int, max_tokens: int, micro_batch_size: int, vocab_size: int, rank: int = 0,
    world_size: int = 1, device: str | torch.device = "cpu",
) -> Iterator[Batch]:  # fmt: skip
    """The first windows of the stream, in its order, split over the ranks; the same set for every world size.

    Every batch has the full shape and every rank the same number of them: missing windows are targets of -100.
    """
    windows = validation_tokens(stream, seq_len, max_tokens) // seq_len
    per_micro_step = micro_batch_size * world_size
    for first in range(0, windows, per_micro_step):
        own = first + rank * micro_batch_size
        starts = np.arange(own, max(own, min(own + micro_batch_size, windows)), dtype=np.int64) * seq_len
        batch = np.zeros((2, micro_batch_size, seq_len), dtype=np.int64)
        batch[1] = IGNORED
        batch[:, : len(starts)] = _windows(stream, starts, seq_len, vocab_size)
        input_ids, targets = torch.from_numpy(batch).to(device).unbind(0)
        yield input_ids, targets
