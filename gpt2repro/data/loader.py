"""Windows of a token stream -> (micro_batch_size, seq_len) tensors on the device, prefetched by a thread.

    loader = TrainLoader(stream, order, sequences_per_step=512, micro_batch_size=16, rank=0, world_size=8,
                         vocab_size=50257)
    batches = loader.batches(first_step=1000)       # resuming is this argument and nothing else
    input_ids, targets = next(batches)              # targets are the next tokens, already shifted

The global batch of a step is the same windows in the same order for every world size and micro batch. A thread rather
than worker processes: reading is far faster than training, and processes outlive a killed run.
"""

import queue
import threading
from collections.abc import Iterator

import numpy as np
import torch

from gpt2repro.data.order import WindowOrder
from gpt2repro.data.shards import TokenStream

PREFETCH = 4  # micro batches; one hides the reading, the rest hide a slow disk
IGNORED = -100  # the target that cross_entropy skips

Batch = tuple[torch.Tensor, torch.Tensor]


def check_ids(stream: TokenStream, starts: np.ndarray, ids: np.ndarray, vocab_size: int) -> None:
    """Raise ValueError for an id past the vocabulary (on a GPU it would be an opaque device-side assert)."""
    if ids.max(initial=0) < vocab_size:
        return
    row, column = np.argwhere(ids >= vocab_size)[0]
    file, index = stream.locate(int(starts[row]) + int(column))
    raise ValueError(
        f"token id {ids[row, column]:,} at position {index:,} of {file} is past vocab_size {vocab_size:,}: the "
        "shards were made with another tokenizer, or the file is damaged; use the model's tokenizer, or verify them"
    )


def _windows(stream: TokenStream, starts: np.ndarray, seq_len: int, vocab_size: int) -> np.ndarray:
    """The windows at `starts`: inputs and next tokens, (2, len(starts), seq_len) int64."""
    ids = np.empty((len(starts), seq_len + 1), dtype=stream.dtype)
    for row, start in enumerate(starts.tolist()):
        ids[row] = stream.read(start, seq_len + 1)
    check_ids(stream, starts, ids, vocab_size)
    return np.stack([ids[:, :-1], ids[:, 1:]], dtype=np.int64)


class TrainLoader:
    """The micro batches of one rank. accumulation = sequences_per_step / (micro_batch_size * world_size)."""

    def __init__(
        self,
        stream: TokenStream,
        order: WindowOrder,
        *,
        sequences_per_step: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int,
        device: str | torch.device = "cpu",
    ) -> None:
        per_micro_step = micro_batch_size * world_size
        if per_micro_step < 1 or sequences_per_step < 1 or sequences_per_step % per_micro_step:
            raise ValueError(
                f"{sequences_per_step} sequences a step do not divide into micro batches of {micro_batch_size} on "
                f"{world_size} processes: sequences_per_step must be a multiple of {per_micro_step}"
            )
        self.stream, self.order, self.vocab_size = stream, order, vocab_size
        self.sequences_per_step, self.micro_batch_size = sequences_per_step, micro_batch_size
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.accumulation = sequences_per_step // per_micro_step

    def window_starts(self, step: int) -> np.ndarray:
        """Stream offsets of the whole global batch of `step`, of all ranks: (sequences_per_step,) int64."""
        return self.order.starts(step * self.sequences_per_step, self.sequences_per_step)

    def batches(self, first_step: int) -> Iterator[Batch]:
        """(input_ids, targets) from `first_step` on, endlessly. Closing the generator ends its thread."""
        ready: queue.Queue[torch.Tensor | BaseException] = queue.Queue(PREFETCH)
        closed = threading.Event()
        # A daemon, so that it never holds up the end of the interpreter.
        threading.Thread(target=self._fill, args=(first_step, ready, closed), name="prefetch", daemon=True).start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                input_ids, targets = item.to(self.device, non_blocking=True).unbind(0)
                yield input_ids, targets
        finally:
            closed.set()

    def _fill(self, step: int, ready: queue.Queue, closed: threading.Event) -> None:
        def put(item: torch.Tensor | BaseException) -> None:
            while not closed.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        try:
            while not closed.is_set():
                # (accumulation, world_size, micro_batch_size): micro step m of rank r is row (m, r)
                starts = self.window_starts(step).reshape(self.accumulation, self.world_size, self.micro_batch_size)
                for micro_starts in starts[:, self.rank]:
                    batch = torch.from_numpy(_windows(self.stream, micro_starts, self.order.seq_len, self.vocab_size))
                    put(batch.pin_memory() if self.device.type == "cuda" else batch)
                    if closed.is_set():
                        return
                step += 1
        except BaseException as error:  # raised again where the batches are consumed
            put(error)


def validation_tokens(stream: TokenStream, seq_len: int, max_tokens: int) -> int:
    """How many targets `validation_batches` yields over all ranks: whole windows within max_tokens."""
    windows = min(max_tokens, stream.tokens - 1) // seq_len
    if windows < 1:
        raise ValueError(
            f"no validation window: {stream.tokens:,} validation tokens and at most {max_tokens:,} of them asked for, "
            f"but one window takes seq_len = {seq_len:,} tokens and the next one; prepare or ask for more"
        )
    return windows * seq_len


def validation_batches(
    stream: TokenStream,
    *,
    seq_len: int,
    max_tokens: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    vocab_size: int,
    device: str | torch.device = "cpu",
) -> Iterator[Batch]:
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
