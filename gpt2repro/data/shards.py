"""Token shards on disk: the project's own format (read, write, verify) and three formats of others (read in place).

Own format: a folder of `train-00000.npy …`, `val-00000.npy …` (1-D uint16, or uint32 where the vocabulary needs it),
the tokenizer's files, and `dataset.json`, which is written last and says what the folder must hold. Every document is
preceded by <|endoftext|>. All shards of a split are ONE stream: nothing is lost at a shard's end.

    dataset = open_dataset("data/fineweb-edu-10bt")     # sizes and headers are checked, contents by verify()
    train = dataset.split("train")
    train.read(start=123_456_789, count=1025)            # token ids; past the end it goes on at token 0

Foreign formats: build-nanogpt folders of .npy, llm.c / modded-nanogpt .bin (magic 20240520, version 1), nanoGPT's .bin
(raw uint16 without a header, so it must be named: format="nanogpt"). They do not say their tokenizer: name it.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 1
SPLITS = ("train", "val")
UNFINISHED = ".preparing"  # the folder inside a dataset folder where prepare.py keeps what is not finished
HEADER_BYTES = 128  # of an own shard: a constant, so that the header can be written after the tokens are counted
LLMC_HEADER_BYTES = 256 * 4  # int32: magic, version, tokens, zeros
LLMC_MAGIC, LLMC_VERSION = 20240520, 1
FORMATS = ("auto", "gpt2repro", "build-nanogpt", "llm.c", "nanogpt")
OPEN_FILES = 64  # shards kept open at once; 350B tokens are 3,500 shards, and a process may hold 1,024 files


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while every id fits (GPT-2's do), uint32 past that. Little-endian, whatever the machine."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def shard_header(dtype: np.dtype, tokens: int) -> bytes:
    """The .npy header of an own shard, always HEADER_BYTES long."""
    fields = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({tokens},), }}"
    magic = b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little")
    return magic + fields.ljust(HEADER_BYTES - 11).encode() + b"\n"


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """A hash of what decides token ids: every entry with its id, and how a probe text is split and merged.

    `tokenizer`: a folder, a Hub id or a loaded tokenizer. The bytes of tokenizer.json would not do: each version of
    the libraries writes them a little differently for the same tokenizer.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(str(tokenizer))
    probe = "The year 1984's  end:\n\n\tdef f(x):\r\n    return x**2 # naïve 東京 🙂 don't<|endoftext|>we'll 1,000.5"
    ids = tokenizer.encode(probe, add_special_tokens=False)
    content = [sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]), ids]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_tokenizer(name: str) -> Any:
    """The tokenizer in a folder or of a Hub id. ValueError where there is none, or none with an end-of-text token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        message = f"no tokenizer loads from {name!r} ({reason}); give a folder with tokenizer.json, or a Hub id"
        raise ValueError(message) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {name!r} has no eos_token, which is what separates documents; set one")
    return tokenizer


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab().values()) + 1


@dataclass(frozen=True)
class Shard:
    """One file of tokens: `tokens` ids of `dtype` from byte `offset` on."""

    path: Path
    dtype: np.dtype
    offset: int
    tokens: int

    def check_size(self) -> "Shard":
        expected, found = self.offset + self.tokens * self.dtype.itemsize, self.path.stat().st_size
        if found != expected:
            what = "truncated" if found < expected else "longer than its header says"
            raise ValueError(
                f"{self.path} is {what}: {found:,} bytes, expected {expected:,} ({self.tokens:,} tokens of "
                f"{self.dtype.itemsize} bytes after a header of {self.offset}); copy or prepare it again"
            )
        return self


class TokenStream:
    """All shards of a split as one circular stream of token ids.

    Plain reads, not memory maps: mapped pages would count as this process's memory and grow to the dataset's size.
    """

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards
        self.tokens = sum(shard.tokens for shard in shards)
        self.dtype = max((shard.dtype for shard in shards), key=lambda dtype: dtype.itemsize)
        self._firsts = np.array([0, *accumulate(shard.tokens for shard in shards)], dtype=np.int64)
        self._lock = threading.Lock()  # a file has one position, and training and validation may share a stream
        self._open = lru_cache(OPEN_FILES)(lambda index: open(shards[index].path, "rb", buffering=0))

    def locate(self, position: int) -> tuple[Path, int]:
        """The shard file that holds a stream position, and the position within that file's tokens."""
        position %= self.tokens
        index = int(np.searchsorted(self._firsts, position, side="right")) - 1
        return self.shards[index].path, position - int(self._firsts[index])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from `start` on, across shard ends; past the end of the stream it goes on at token 0."""
        out = np.empty(count, dtype=self.dtype)
        position, done = start % self.tokens, 0
        index = int(np.searchsorted(self._firsts, position, side="right")) - 1
        while done < count:
            shard, first = self.shards[index], position - int(self._firsts[index])
            part = min(count - done, shard.tokens - first)
            out[done : done + part] = self._read_shard(index, first, part)
            done, position = done + part, (position + part) % self.tokens
            index = (index + 1) % len(self.shards)
        return out

    def _read_shard(self, index: int, first: int, count: int) -> np.ndarray:
        shard = self.shards[index]
        ids = np.empty(count, dtype=shard.dtype)
        with self._lock:
            file = self._open(index)
            file.seek(shard.offset + first * shard.dtype.itemsize)
            view, got = ids.view(np.uint8).data, 0
            while got < len(view):
                part = file.readinto(view[got:])
                if not part:
                    raise ValueError(f"{shard.path} ends early: it was cut after it was opened; copy it again")
                got += part
        return ids


@dataclass
class Dataset:
    """An opened dataset: its splits as streams, and what is recorded about them (`info`, as in dataset.json)."""

    path: str
    streams: dict[str, TokenStream]
    tokenizer: str | None
    tokenizer_sha256: str
    vocab_size: int
    eot_id: int
    fingerprint: str
    info: dict

    def split(self, name: str) -> TokenStream:
        if name not in self.streams:
            raise ValueError(
                f"{self.path} has no split {name!r}, only {' and '.join(map(repr, self.streams))}; "
                "prepare it with a validation split (--val-tokens), or name one that it has"
            )
        return self.streams[name]

    def verify(self) -> list[str]:
        """Recompute every recorded sha256, of shards and tokenizer. One line for each that differs.

        Raises ValueError where none is recorded, and for a tokenizer that does not load.
        """
        damaged = []
        if self.tokenizer and (found := tokenizer_sha256(self.tokenizer)) != self.tokenizer_sha256:
            damaged.append(f"{self.tokenizer}: the tokenizer's sha256 is {found}, recorded {self.tokenizer_sha256}")
        for name, stream in self.streams.items():
            for shard, record in zip(stream.shards, self.info["splits"][name]["shards"], strict=True):
                if "sha256" not in record:
                    raise ValueError(f"{self.path} is in a foreign format, which records no sha256 to verify")
                if (found := file_sha256(shard.path)) != record["sha256"]:
                    damaged.append(f"{shard.path}: sha256 {found}, recorded {record['sha256']}")
        return damaged


def open_dataset(
    path_or_paths: str | Path | list,
    *,
    format: str = "auto",  # noqa: A002 — the word that recipes use
    tokenizer: str | None = None,
) -> Dataset:
    """Open a prepared folder, or foreign shards in place; several folders (parts) become one stream per split.

    format: auto, gpt2repro, build-nanogpt, llm.c or nanogpt. tokenizer: a folder or Hub id, for foreign shards only.
    Raises ValueError for what is missing, damaged, or made with different tokenizers.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: one of {', '.join(FORMATS)}")
    paths = [Path(path) for path in (path_or_paths if isinstance(path_or_paths, list | tuple) else [path_or_paths])]
    if not paths:
        raise ValueError("no dataset folder given; name at least one")
    datasets = [_open_one(path, format, tokenizer) for path in paths]
    return datasets[0] if len(datasets) == 1 else _join(datasets)


def _open_one(path: Path, layout: str, tokenizer: str | None) -> Dataset:
    if not path.exists():
        raise ValueError(f"{path} does not exist; prepare it with: python -m gpt2repro.data.prepare --out {path} …")
    own = (path / "dataset.json").exists() or (path / UNFINISHED).exists()
    if layout == "gpt2repro" or (layout == "auto" and own):
        return _open_own(path)
    return _open_foreign(path, layout, tokenizer)


def _open_own(path: Path) -> Dataset:
    file = path / "dataset.json"
    if not file.exists():
        unfinished = (path / UNFINISHED).exists()
        state = "its preparation is not finished: run the same command again" if unfinished else "it is no dataset"
        raise ValueError(f"{path} has no dataset.json: {state}")
    try:
        content = file.read_bytes()
        info = json.loads(content)
        version = info["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"{file} is of version {version}, this code reads {FORMAT_VERSION}; prepare it again")
        dtype = token_dtype(info["vocab_size"])
        streams = {}
        for name in SPLITS:
            records = info["splits"][name]["shards"]
            if records:
                shards = [Shard(path / record["file"], dtype, HEADER_BYTES, record["tokens"]) for record in records]
                streams[name] = TokenStream([_check_own(shard) for shard in shards])
        return Dataset(
            str(path), streams, str(path), info["tokenizer_sha256"], info["vocab_size"], info["eot_id"],
            hashlib.sha256(content).hexdigest(), info,
        )  # fmt: skip
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is broken ({type(error).__name__}: {error}); copy or prepare it again") from error


def _check_own(shard: Shard) -> Shard:
    if not shard.path.exists():
        raise ValueError(f"{shard.path} is missing, but dataset.json lists it; copy it again, or prepare again")
    shard.check_size()
    with open(shard.path, "rb") as file:
        if file.read(HEADER_BYTES) != shard_header(shard.dtype, shard.tokens):
            raise ValueError(f"{shard.path} has another header than dataset.json says; copy or prepare it again")
    return shard


def _npy_shard(path: Path) -> Shard:
    """A shard as numpy.save writes it (build-nanogpt)."""
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no readable .npy file ({error}); copy or tokenise it again") from error
    if array.ndim != 1 or array.dtype.str not in ("<u2", "<u4"):
        raise ValueError(f"{path} holds {array.dtype} of shape {array.shape}, expected 1-D uint16 or uint32")
    return Shard(path, array.dtype, array.offset, len(array)).check_size()


def _llmc_shard(path: Path) -> Shard:
    """A shard of llm.c or modded-nanogpt: 256 int32 of header, then uint16."""
    header = np.fromfile(path, dtype="<i4", count=3)
    if len(header) < 3 or header[0] != LLMC_MAGIC:
        found = f"magic {header[0]}" if len(header) else "an empty file"
        raise ValueError(
            f"{path} has {found}, expected {LLMC_MAGIC} (llm.c, modded-nanogpt); "
            'if these are nanoGPT\'s raw uint16 ids without a header, say so: format "nanogpt"'
        )
    if header[1] != LLMC_VERSION:
        raise ValueError(f"{path} is of version {header[1]}, expected {LLMC_VERSION} (uint16 ids of GPT-2)")
    return Shard(path, np.dtype("<u2"), LLMC_HEADER_BYTES, int(header[2])).check_size()


def _nanogpt_shard(path: Path) -> Shard:
    """nanoGPT's train.bin or val.bin: uint16 ids and nothing else."""
    size = path.stat().st_size
    if not size or size % 2:
        raise ValueError(f"{path} has {size:,} bytes, which is no whole number of uint16 ids; copy it again")
    return Shard(path, np.dtype("<u2"), 0, size // 2)


FOREIGN = {"build-nanogpt": (".npy", _npy_shard), "llm.c": (".bin", _llmc_shard), "nanogpt": (".bin", _nanogpt_shard)}


def _open_foreign(path: Path, layout: str, tokenizer: str | None) -> Dataset:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if layout == "auto":
        suffixes = {file.suffix for file in files} & {".npy", ".bin"}
        if len(suffixes) != 1:
            found = "both .npy and .bin files" if suffixes else "neither dataset.json nor .npy or .bin shards"
            raise ValueError(f"{path} holds {found}; name a prepared dataset, or the format: {', '.join(FORMATS[2:])}")
        layout = "build-nanogpt" if suffixes == {".npy"} else "llm.c"
    suffix, read = FOREIGN[layout]
    files = [file for file in files if file.suffix == suffix]
    by_split: dict[str, list[Shard]] = {name: [] for name in SPLITS}
    for file in files:
        if split := next((name for name in SPLITS if name in file.name), None):
            by_split[split].append(read(file))
    streams = {name: TokenStream(shards) for name, shards in by_split.items() if sum(s.tokens for s in shards)}
    if not streams:
        raise ValueError(f"{path} has no {suffix} file of {layout} with 'train' or 'val' in its name; rename them")
    if tokenizer is None:
        raise ValueError(f"{path} is in {layout}'s format, which does not say its tokenizer; name it (GPT-2's: gpt2)")
    loaded = load_tokenizer(tokenizer)
    info: dict = {"format": layout, "splits": {}}
    for name, stream in streams.items():
        records = [{"file": shard.path.name, "tokens": shard.tokens} for shard in stream.shards]
        info["splits"][name] = {"tokens": stream.tokens, "shards": records}
    fingerprint = hashlib.sha256(json.dumps(info).encode()).hexdigest()
    return Dataset(
        str(path), streams, tokenizer, tokenizer_sha256(loaded), vocabulary_size(loaded), loaded.eos_token_id,
        fingerprint, info,
    )  # fmt: skip


def _join(datasets: list[Dataset]) -> Dataset:
    """Several datasets as one, in the order given. They must share their tokenizer."""
    first = datasets[0]
    for other in datasets[1:]:
        if other.tokenizer_sha256 != first.tokenizer_sha256:
            raise ValueError(f"{other.path} was made with another tokenizer than {first.path}; prepare both with one")
    joined: dict[str, TokenStream] = {}
    splits: dict[str, dict] = {}
    for name in SPLITS:
        having = [dataset for dataset in datasets if name in dataset.streams]
        if having:
            joined[name] = TokenStream([shard for dataset in having for shard in dataset.streams[name].shards])
            records = [dataset.info["splits"][name] for dataset in having]
            splits[name] = {key: _total([record[key] for record in records]) for key in records[0]}
    fingerprint = hashlib.sha256("".join(dataset.fingerprint for dataset in datasets).encode()).hexdigest()
    path = ", ".join(dataset.path for dataset in datasets)
    return Dataset(
        path, joined, first.tokenizer, first.tokenizer_sha256, first.vocab_size, first.eot_id, fingerprint,
        {**first.info, "splits": splits, "datasets": [dataset.info for dataset in datasets]},
    )  # fmt: skip


def _total(values: list) -> Any:
    """Counts add up, lists of shards are joined."""
    return sum(values[1:], start=values[0])


class ShardWriter:
    """Appends token ids to the unfinished shard of one split and names each shard when it is full.

    What is on disk at a checkpoint is described by `record()`; `ShardWriter(…, record=…)` goes on from exactly there,
    whatever was written after it.
    """

    def __init__(
        self, folder: Path, split: str, *, dtype: np.dtype, shard_tokens: int, record: dict | None = None
    ) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        record = record or {"shards": [], "partial_tokens": 0}
        self.shards: list[dict] = list(record["shards"])
        self.partial = folder / UNFINISHED / f"{split}.npy"
        self._begin(record["partial_tokens"])

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards) + self.partial_tokens

    def _begin(self, tokens: int) -> None:
        """Open the unfinished shard at its first `tokens` tokens; shards finished after the checkpoint are undone."""
        final = self._final(len(self.shards))
        if final.exists():
            os.replace(final, self.partial)
            stale = len(self.shards) + 1
            while (path := self._final(stale)).exists():
                path.unlink()
                stale += 1
        self.file = open(self.partial, "r+b" if self.partial.exists() else "w+b")
        self.partial_tokens, size = tokens, HEADER_BYTES + tokens * self.dtype.itemsize
        if tokens and self.partial.stat().st_size < size:
            raise ValueError(f"{self.partial} lost what was written to it; delete {self.folder} and prepare again")
        self.file.truncate(size)
        self.file.seek(0, os.SEEK_END)

    def _final(self, index: int) -> Path:
        return self.folder / f"{self.split}-{index:05d}.npy"

    def write(self, ids: np.ndarray) -> bool:
        """Append ids, over as many shards as they take. True if a shard was finished."""
        finished = False
        while len(ids):
            part, ids = np.split(ids, [self.shard_tokens - self.partial_tokens])
            self.file.write(part.astype(self.dtype, copy=False).data)
            self.partial_tokens += len(part)
            if self.partial_tokens == self.shard_tokens:
                self.finish_shard()
                finished = True
        return finished

    def finish_shard(self) -> None:
        """Header, sync, hash, rename: a shard with its final name is whole."""
        if self.partial_tokens:
            self.file.seek(0)
            self.file.write(shard_header(self.dtype, self.partial_tokens))
            self.sync()
            final = self._final(len(self.shards))
            record = {"file": final.name, "tokens": self.partial_tokens, "sha256": file_sha256(self.partial)}
            self.file.close()
            os.replace(self.partial, final)
            self.shards.append(record)
            self._begin(0)

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def record(self) -> dict:
        """What is safely on disk now: a checkpoint's half of this split."""
        self.sync()
        return {"shards": list(self.shards), "partial_tokens": self.partial_tokens}


def read_documents(stream: TokenStream, eot_id: int, *, limit: int) -> Iterator[np.ndarray]:
    """The ids of each document without <|endoftext|>, from the first `limit` tokens; one cut there is left out."""
    rest = np.empty(0, dtype=stream.dtype)
    total = min(limit, stream.tokens)
    for start in range(0, total, 2**24):
        rest = np.concatenate([rest, stream.read(start, min(2**24, total - start))])
        ends = np.flatnonzero(rest == eot_id)
        if len(ends):
            pieces = np.split(rest, ends)
            yield from (piece[1:] for piece in pieces[1:-1])
            rest = pieces[-1]
    if total == stream.tokens and len(rest):
        yield rest[1:]
