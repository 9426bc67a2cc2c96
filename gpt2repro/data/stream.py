"""One stream of token ids from many files, whatever format they are in.

    stream = TokenStream([Shard(path, dtype=np.dtype("<u2"), offset=128, tokens=100_000_000), ...])
    stream.read(start=123_456_789, count=1025)            # token ids; after the last token comes token 0
"""

import os
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

SPLITS = ("train", "val")
_SEEKING = threading.Lock()
OPEN_FILES = 64  # shards kept open at once; 350B tokens are 3,500 shards, and a process may have 1,024 files open


@dataclass(frozen=True)
class Shard:
    """One file of tokens: `tokens` ids of `dtype` from byte `offset` on, and its recorded sha256.

    Raises ValueError if the file is missing or has another size.
    """

    path: Path
    dtype: np.dtype
    offset: int
    tokens: int
    sha256: str | None = None

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        expected = self.offset + self.tokens * self.dtype.itemsize
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != expected:
            what = "longer than its header says" if size > expected else "truncated" if size else "missing"
            raise ValueError(f"{self.path} is {what}: {size:,} bytes, expected {expected:,}; copy or make it again")


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """`os.pread`, which Windows has not."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    with _SEEKING:  # another thread reads the same file
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)


class TokenStream:
    """All shards of a split as one circular stream of token ids.

    Plain reads, not memory maps: mapped pages would count as this process's memory and grow to the dataset's size.
    """

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards
        self.tokens = sum(shard.tokens for shard in shards)
        self.dtype = np.result_type(*(shard.dtype for shard in shards))
        self._ends = np.cumsum([shard.tokens for shard in shards])
        self._open = lru_cache(OPEN_FILES)(lambda path: open(path, "rb", buffering=0))

    def locate(self, position: int, ahead: int = 0) -> tuple[Shard, int]:
        """The shard of the token `ahead` of a stream position, and the place within its tokens."""
        position = (position + ahead) % self.tokens
        index = int(np.searchsorted(self._ends, position, side="right"))
        return self.shards[index], position - int(self._ends[index]) + self.shards[index].tokens

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from `start` on, across shard ends; after the last token of the stream comes token 0."""
        parts = [np.empty(0, self.dtype)]
        while count > 0:
            shard, first = self.locate(start)
            part = min(count, shard.tokens - first)
            offset, size = shard.offset + first * shard.dtype.itemsize, part * shard.dtype.itemsize
            file = self._open(shard.path)  # held: the cache may drop and so close it for another thread
            content = read_at(file.fileno(), size, offset)
            part = len(content) // shard.dtype.itemsize  # one read gives at most 2 GiB, on a network disk less
            if not part:
                raise ValueError(f"{shard.path} ends early: it was cut after it was opened; copy it again")
            parts.append(np.frombuffer(content, shard.dtype, part))
            start, count = start + part, count - part
        return np.concatenate(parts)
