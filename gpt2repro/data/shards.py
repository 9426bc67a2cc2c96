"""Token shards on disk: the project's own format (read, write, verify), and those of others (foreign.py).

Own format: a folder of `train-00000.npy …`, `val-00000.npy …` (1-D uint16, or uint32 where the vocabulary needs it),
the tokenizer's files, and `dataset.json`, which is written last and records what the folder holds. <|endoftext|>
precedes every document. All shards of a split are ONE stream: nothing is lost at a shard's end.

    dataset = open_dataset("data/fineweb-edu-10b")      # checks sizes and headers; verify() checks contents
    train = dataset.split("train")
    train.read(start=123_456_789, count=1025)            # token ids; after the last token comes token 0
"""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gpt2repro.command import say
from gpt2repro.data.foreign import FOREIGN, find_shards
from gpt2repro.data.hashes import known_sha256
from gpt2repro.data.published import local_folder
from gpt2repro.data.stream import SPLITS, Shard, TokenStream
from gpt2repro.files import file_sha256, seal, sync, write_whole

FORMAT_VERSION = 2  # 1 had no seal
UNFINISHED = ".preparing"  # the folder inside a dataset folder where prepare.py keeps what is not finished
HEADER_BYTES = 128  # of an own shard: a constant, so that the header can be written after the tokens are counted
FORMATS = ("auto", "gpt2repro", *FOREIGN)
PROBE_TOKENS = 2**20  # of a foreign dataset, in which <|endoftext|> is looked for


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while every id fits (GPT-2's do), else uint32. Little-endian on every machine."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def shard_header(dtype: np.dtype, tokens: int) -> bytes:
    """The .npy header of an own shard, always HEADER_BYTES long: numpy leaves room for the largest count."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": (tokens,)})
    return header.getvalue()


# ---------------------------------------------------------------------------------------------------- tokenizers


def load_tokenizer(name: str) -> Any:
    """The tokenizer in a folder or of a Hub id. ValueError where there is none, or none with an end-of-text token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(name))
    except Exception as error:  # a damaged file makes the libraries raise almost anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"no tokenizer loads from {name!r} ({reason}); give its folder or its Hub id") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {name!r} has no eos_token, which is what separates documents; set one")
    return tokenizer


def tokenizer_sha256(tokenizer: Any) -> str:
    """A hash of what decides token ids: every entry with its id, and how a probe text is split and merged.

    `tokenizer`: a folder, a Hub id or a loaded tokenizer. Not the bytes of tokenizer.json, which each version of the
    libraries writes a little differently for the same tokenizer.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(str(tokenizer))
    probe = "The year 1984's  end:\n\n\tdef f(x):\r\n    return x**2 # naïve 東京 🙂 don't<|endoftext|>we'll 1,000.5"
    ids = tokenizer.encode(probe, add_special_tokens=False)
    content = [sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]), ids]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def tokenizer_record(tokenizer: Any) -> dict:
    """What dataset.json records of a loaded tokenizer. vocab_size: one more than the largest id."""
    digest, vocab_size = tokenizer_sha256(tokenizer), max(tokenizer.get_vocab().values()) + 1
    return {"tokenizer_sha256": digest, "vocab_size": vocab_size, "eot_id": tokenizer.eos_token_id}


# ---------------------------------------------------------------------------------------------------- reading


def read_record(file: Path) -> dict:
    """The content of a dataset.json, or of the record of an unfinished preparation.

    Raises ValueError for one that is damaged, or of another version.
    """
    advice = "copy the folder, or delete it and prepare it again"
    try:
        record = json.loads(file.read_bytes())
        version = record["format_version"]
        intact = version != FORMAT_VERSION or record.pop("sha256") == seal(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is broken ({type(error).__name__}: {error}); {advice}") from None
    if version not in (1, FORMAT_VERSION):
        raise ValueError(f"{file} has version {version}, not {FORMAT_VERSION}; {advice}")
    if not intact:
        raise ValueError(f"{file} is damaged (its sha256 is not the recorded one); {advice}")
    return record


def write_record(file: Path, content: dict) -> None:
    """Write a record with its version and its seal, whole or not at all."""
    record = {"format_version": FORMAT_VERSION, **content}
    write_whole(file, json.dumps({**record, "sha256": seal(record)}, indent=1, ensure_ascii=False) + "\n")


@dataclass
class Dataset:
    """An opened dataset: its shards by split, and what is recorded about them (`info`, as in dataset.json).

    `streams` has the splits that are not empty. Of several folders `info` is the first one's, `info["datasets"]` has
    those of all, and `parts` are their datasets.
    """

    path: str
    shards: dict[str, list[Shard]]
    tokenizer: str
    fingerprint: str
    info: dict
    tokenizer_sha256: str
    vocab_size: int
    eot_id: int
    parts: tuple["Dataset", ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """For other processes: without the streams, which hold open files."""
        return {name: value for name, value in self.__dict__.items() if name != "streams"}

    @cached_property
    def streams(self) -> dict[str, TokenStream]:
        splits = ((name, self.shards[name]) for name in SPLITS)
        return {name: TokenStream(shards) for name, shards in splits if any(s.tokens for s in shards)}

    def split(self, name: str) -> TokenStream:
        if name not in self.streams:
            raise ValueError(f"{self.path} has no split {name!r}, only {[*self.streams]}; prepare with --val-tokens")
        return self.streams[name]

    def verify(self) -> list[str]:
        """Recompute every recorded sha256, of shards and tokenizer. One line for each that differs.

        Raises ValueError where none is recorded, and for a tokenizer that does not load.
        """
        damaged = []
        if (digest := tokenizer_sha256(self.tokenizer)) != self.tokenizer_sha256:
            damaged.append(f"{self.tokenizer}: the tokenizer's sha256 is {digest}, recorded {self.tokenizer_sha256}")
        for shard in (shard for name in SPLITS for shard in self.shards[name]):
            if shard.sha256 is None:
                raise ValueError(f"{self.path} is in a foreign format, which records no sha256 to verify")
            if (digest := file_sha256(shard.path)) != shard.sha256:
                damaged.append(f"{shard.path}: sha256 {digest}, recorded {shard.sha256}")
        return damaged


def open_dataset(
    path_or_paths: str | Path | list, *, format: str = "auto", tokenizer: str | None = None  # noqa: A002
) -> Dataset:
    """Open a prepared folder, on disk or on the Hub, or foreign shards in place; several become one stream per split.

    format: one of FORMATS. tokenizer: a folder or Hub id, for foreign shards only.
    Raises ValueError for what is missing, damaged, or made with different tokenizers.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: one of {', '.join(FORMATS)}")
    paths = [path_or_paths] if isinstance(path_or_paths, str | Path) else path_or_paths
    if not paths:
        raise ValueError("no dataset folder given; name at least one")
    datasets = [_open_one(local_folder(path), format, tokenizer) for path in paths]
    return _join(datasets) if len(datasets) > 1 else datasets[0]


def check_contents(dataset: Dataset, splits: Sequence[str] = SPLITS) -> Dataset:
    """The dataset, after each shard's content was compared with its record; foreign shards' contents identify them.

    Raises ValueError for a shard that is not the recorded one. Each shard is read once, and then only if it changed.
    """
    shards = [shard for name in splits for shard in dataset.shards[name]]
    digests = known_sha256(shard.path for shard in shards)
    for shard, digest in zip(shards, digests, strict=True):
        if shard.sha256 not in (None, digest):
            advice = "it is damaged or another file: copy or prepare it again"
            raise ValueError(f"{shard.path} has the sha256 {digest}, recorded is {shard.sha256}; {advice}")
    if all(shard.sha256 for shard in shards):
        return dataset
    return replace(dataset, fingerprint=seal({"opened": dataset.fingerprint, "shards": digests}))


def _open_one(path: Path, layout: str, tokenizer: str | None) -> Dataset:
    if not path.exists():
        raise ValueError(f"{path} does not exist; prepare it with: python -m gpt2repro.data.prepare --out {path} …")
    if layout in ("auto", "gpt2repro") and (path / "dataset.json").exists():
        return _open_own(path)
    if (path / UNFINISHED).exists():
        raise ValueError(f"{path} has no dataset.json: its preparation is not finished: run the same command again")
    return _open_foreign(path, layout, tokenizer)


def _open_own(path: Path) -> Dataset:
    file = path / "dataset.json"
    info = read_record(file)
    try:
        tokenizer = {key: info[key] for key in ("vocab_size", "eot_id", "tokenizer_sha256")}
        dtype = token_dtype(info["vocab_size"])
        records = {name: info["splits"][name]["shards"] for name in SPLITS}
        shards = {name: [_own_shard(path, dtype, record) for record in records[name]] for name in SPLITS}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is broken ({type(error).__name__}: {error}); copy or prepare it again") from error
    return Dataset(str(path), shards, str(path), file_sha256(file), info, **tokenizer)


def _open_foreign(path: Path, layout: str, tokenizer: str | None) -> Dataset:
    layout, shards, recorded = find_shards(path, layout)
    tokenizer = tokenizer or recorded
    if tokenizer is None:
        raise ValueError(f"{path} is in {layout}'s format and does not say its tokenizer; name it (GPT-2's: gpt2)")
    info: dict = {"format": layout, "splits": {}}
    for name in (name for name in SPLITS if shards[name]):
        records = [{"file": shard.path.name, "tokens": shard.tokens} for shard in shards[name]]
        info["splits"][name] = {"tokens": sum(shard.tokens for shard in shards[name]), "shards": records}
    fingerprint = hashlib.sha256(json.dumps(info).encode()).hexdigest()
    tokens = tokenizer_record(load_tokenizer(tokenizer))
    if recorded and recorded != tokenizer:
        _compare_tokenizers(path, recorded, tokenizer, tokens["tokenizer_sha256"])
    dataset = Dataset(str(path), shards, tokenizer, fingerprint, info, **tokens)
    if layout == "datatrove":
        _check_datatrove(dataset)
    return dataset


def _compare_tokenizers(path: Path, recorded: str, named: str, sha256: str) -> None:
    """Refuse a named tokenizer that is not the one that made the shards; one on the Hub is not fetched for this."""
    if not Path(recorded).exists():
        say(f"{path} was made with {recorded}; {named} is taken to be the same tokenizer")
    elif tokenizer_sha256(recorded) != sha256:
        raise ValueError(f"{path} was made with {recorded}, another tokenizer than {named}: leave the tokenizer out")


def _check_datatrove(dataset: Dataset) -> None:
    """Refuse another tokenizer's size of an id. Without its eos_token datatrove does not mark where documents end."""
    dtype = token_dtype(dataset.vocab_size)
    for stream in dataset.streams.values():
        if stream.dtype != dtype:
            wrong = f"{dataset.path} holds {stream.dtype.name}, but {dataset.tokenizer} has {dataset.vocab_size:,} ids"
            raise ValueError(f"{wrong}, which are {dtype.name}: name the tokenizer that made it")
        if dataset.eot_id not in stream.read(0, min(stream.tokens, PROBE_TOKENS)):
            say(f"warning: {dataset.path} has no <|endoftext|> between documents: give datatrove an eos_token")


def _join(datasets: list[Dataset]) -> Dataset:
    """Several datasets as one, in the order given."""
    first = datasets[0]
    for dataset in datasets:
        if dataset.tokenizer_sha256 != first.tokenizer_sha256:
            raise ValueError(f"{dataset.path} was made with another tokenizer than {first.path}; prepare both alike")
    path = ", ".join(dataset.path for dataset in datasets)
    shards = {name: [shard for dataset in datasets for shard in dataset.shards[name]] for name in SPLITS}
    fingerprint = hashlib.sha256("".join(dataset.fingerprint for dataset in datasets).encode()).hexdigest()
    info = {**first.info, "datasets": [dataset.info for dataset in datasets]}
    return replace(first, path=path, shards=shards, fingerprint=fingerprint, info=info, parts=tuple(datasets))


def _own_shard(folder: Path, dtype: np.dtype, record: dict) -> Shard:
    path = folder / record["file"]
    shard = Shard(path, dtype, HEADER_BYTES, record["tokens"], record.get("sha256"))
    with open(path, "rb") as file:
        if file.read(HEADER_BYTES) != shard_header(dtype, shard.tokens):
            raise ValueError(f"{path} has another header than dataset.json says; copy or prepare it again")
    return shard


# ---------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Appends token ids to the unfinished shard of one split, and names each shard when it is full.

    `record` is what dataset.json records of the split. A writer that is given the record of an earlier `flush`
    continues exactly there, whatever was written after it.
    """

    def __init__(
        self, folder: Path, split: str, record: dict | None = None, *, vocab_size: int, eot_id: int, shard_tokens: int
    ) -> None:
        self.record: dict = record or {"tokens": 0, "documents": 0, "shards": []}
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.dtype, self.eot_id = token_dtype(vocab_size), eot_id
        self.unfinished = folder / UNFINISHED / f"{split}.npy"
        self._open()

    def _open(self) -> None:
        """Open the unfinished shard where the record ends; a shard that was finished after it is unfinished again."""
        self.finished = self.folder / f"{self.split}-{len(self.record['shards']):05d}.npy"
        if self.finished.exists():
            os.replace(self.finished, self.unfinished)
        self.tokens = self.record["tokens"] - sum(shard["tokens"] for shard in self.record["shards"])
        size = HEADER_BYTES + self.tokens * self.dtype.itemsize
        self.file = open(self.unfinished, "r+b" if self.unfinished.exists() else "w+b")
        if self.tokens and self.unfinished.stat().st_size < size:
            raise ValueError(f"{self.unfinished} lost what was written to it; delete {self.folder} and prepare again")
        self.file.truncate(size)
        self.file.seek(size)

    def write(self, ids: np.ndarray) -> None:
        """Append ids, over as many shards as they take."""
        self.record["documents"] += int(np.count_nonzero(ids == self.eot_id))
        while len(ids):
            part, ids = np.split(ids, [self.shard_tokens - self.tokens])
            self.file.write(part.astype(self.dtype, copy=False).data)
            self.record["tokens"] += len(part)
            self.tokens += len(part)
            if self.tokens == self.shard_tokens:
                self.finish_shard()

    def finish_shard(self) -> None:
        """Write the header, sync, rename and hash: a shard with its final name is complete."""
        if self.tokens:
            self.file.seek(0)
            self.file.write(shard_header(self.dtype, self.tokens))
            self.flush()
            self.file.close()
            os.replace(self.unfinished, self.finished)
            sync(self.folder)
            (digest,) = known_sha256([self.finished])  # training compares it
            self.record["shards"].append({"file": self.finished.name, "tokens": self.tokens, "sha256": digest})
            self._open()

    def flush(self) -> None:
        """Wait until the disk has all that was written."""
        self.file.flush()
        sync(self.unfinished)
