"""Documents -> token shards, without babysitting: any number of workers and any number of kills give the same bytes.

    python -m gpt2repro.data.prepare --source python-docs --tokenizer train:4096 --out data/python-docs
    python -m gpt2repro.data.prepare --source files --files 'my/*.jsonl.zst' --tokenizer gpt2 --out data/my --workers 8
    python -m gpt2repro.data.prepare --source fineweb-edu --tokenizer gpt2 --out data/fineweb-edu --workers 16 --fast

A folder comes out (see shards.py): shards of --shard-tokens tokens, the tokenizer, and dataset.json when all is done.
Killed or out of disk, the same command goes on where it was: `.preparing/state.json` says what was safely on disk and
where in the source that was. This process reads, checks and cuts documents and writes tokens; workers only encode.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gpt2repro.data import encoding
from gpt2repro.data.shards import (
    FORMAT_VERSION,
    SPLITS,
    UNFINISHED,
    ShardWriter,
    load_tokenizer,
    token_dtype,
    tokenizer_sha256,
    vocabulary_size,
)
from gpt2repro.data.sources import NOT_TEXT, NOT_UTF8, SOURCES, Document, Source, Text, open_source

BATCH_BYTES = 2**20  # of text to a worker at a time: a second of its work
CHECKPOINT_SECONDS = 5.0  # at most this much work is done twice
BPE_TRAINING_BYTES = 2**28  # more text moves no merge that matters, and the trainer's memory grows with it
LONGEST_TOKEN_BYTES = 8  # on average, generously: how much text --val-tokens may take, when there is no tokenizer yet
SPARE_DISK = 2**28


@dataclass
class Progress:
    """How far a preparation is: what state.json holds besides the settings and the shards."""

    position: Any = None
    ordinal: int = 0  # records of the source seen, of all parts
    skipped: dict[str, int] = field(default_factory=lambda: dict.fromkeys((encoding.EMPTY, NOT_TEXT, NOT_UTF8), 0))


@dataclass
class Batch:
    """Work for one worker: pieces of documents of each split, and the progress after the last of them."""

    pieces: dict[str, list[tuple[bytes, bool]]] = field(default_factory=lambda: {name: [] for name in SPLITS})
    bytes: int = 0
    progress: Progress | None = None  # None: this batch ends inside a document, nothing can restart from here
    done: float | None = None


def is_validation(text: Text, fraction: float) -> bool:
    """By the document's own sha256, so that a duplicate never lands on both sides and no order matters."""
    digest = hashlib.sha256()
    for chunk in encoding.chunks(text):
        digest.update(chunk)
    return int.from_bytes(digest.digest()[:8], "big") >= (1 - fraction) * 2**64


def batches(
    documents: Iterator[Document],
    progress: Progress,
    *,
    fraction: float,
    part: tuple[int, int],
    encode: encoding.Encode,
) -> Iterator[Batch]:
    """Documents that belong to this part, checked, assigned to a split, cut, and gathered to batches."""
    batch = Batch()
    for document in documents:
        mine = progress.ordinal % part[1] == part[0]
        progress.ordinal += 1
        if mine:
            reason = document.skipped or encoding.reason_to_skip(document.text)
            if reason:
                progress.skipped[reason] += 1
            else:
                split = "val" if fraction and is_validation(document.text, fraction) else "train"
                begins = True
                for piece in encoding.cut_document(document.text, encode):
                    if batch.bytes >= BATCH_BYTES:
                        yield batch
                        batch = Batch()
                    batch.pieces[split].append((piece, begins))
                    batch.bytes += len(piece)
                    begins = False
        progress.position = document.position
        batch.progress, batch.done = None, document.done
        if batch.bytes >= BATCH_BYTES:
            batch.progress = deepcopy(progress)
            yield batch
            batch = Batch()
    batch.progress = deepcopy(progress)
    yield batch


# ---------------------------------------------------------------------------------------------------- workers

_worker_encode: Any = None  # set by _start_worker


def _start_worker(tokenizer_file: Path, eot_id: int, dtype: np.dtype, fast: bool) -> None:
    """Load the encoder, and end with the main process: after its SIGKILL nobody else would end a worker."""
    global _worker_encode
    encode = (encoding.fast_encoder if fast else encoding.exact_encoder)(tokenizer_file)
    _worker_encode = partial(encoding.encode_pieces, encode, eot_id, dtype)
    parent = multiprocessing.parent_process()
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _encode_batch(pieces: dict[str, list[tuple[bytes, bool]]]) -> dict[str, np.ndarray]:
    return {name: _worker_encode(pieces[name]) for name in SPLITS}


def encoded(work: Iterator[Batch], workers: int, settings: tuple) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """Each batch with its ids, in order; a few batches a worker are under way at a time."""
    if workers == 1:
        _start_worker(*settings)
        for batch in work:
            yield batch, _encode_batch(batch.pieces)
        return
    # spawn: a forked copy of a process that has threads (tokenizers has) may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=settings) as pool:
        pending: deque[tuple[Batch, Future]] = deque()
        for batch in work:
            pending.append((batch, pool.submit(_encode_batch, batch.pieces)))
            if len(pending) > 3 * workers:
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()


# ---------------------------------------------------------------------------------------------------- the whole


def prepare(
    *,
    source: str,
    tokenizer: str,
    out: str | Path,
    files: list[str] | None = None,
    val_tokens: int | None = None,
    val_fraction: float | None = None,
    workers: int = 1,
    shard_tokens: int = 100_000_000,
    part: str = "0/1",
    fast: bool = False,
    dataset: str | None = None,
    config: str | None = None,
    split: str = "train",
    text_field: str = "text",
    revision: str | None = None,
) -> Path:
    """Prepare `source` into the folder `out`, or go on with it. Returns the folder; ValueError says what is wrong.

    tokenizer: a folder, a Hub id, or train:N for a byte-level BPE of N entries trained on the training documents.
    Validation: the first val_tokens tokens, or the val_fraction of documents by hash (0.01; python-docs 0.1).
    part: I/N, the I-th (from 0) of N disjoint parts. fast: gigatoken, where it gives the same ids.
    """
    out = Path(out)
    index_of = _parse_part(part)
    recorded = _recorded(out)
    revision = revision or recorded.get("source", {}).get("revision")  # go on with the commit it began with
    origin = open_source(source, files=files, dataset=dataset, config=config, split=split, text_field=text_field,
                         revision=revision, part=index_of)  # fmt: skip
    if workers < 1 or shard_tokens < 1:
        raise ValueError(f"workers {workers} and shard_tokens {shard_tokens} must be at least 1")
    trained = tokenizer.startswith("train:")
    if trained and not (tokenizer.removeprefix("train:").isdigit() and part == "0/1"):
        raise ValueError(
            f"tokenizer {tokenizer!r} for part {part}: train:N takes a number, such as train:4096, and the whole "
            "source; for parts, train on a sample first and name its folder"
        )
    settings = {
        "source": origin.record,
        "tokenizer": tokenizer if trained else tokenizer_sha256(tokenizer),
        "validation": _validation(origin, val_tokens, val_fraction),
        "shard_tokens": shard_tokens,
        "part": part,
    }
    _refuse_other_settings(out, recorded, settings)
    if (out / "dataset.json").exists() and not (out / UNFINISHED).exists():
        print(f"{out} is prepared already", file=sys.stderr)
        return out
    with _exclusive(out):
        if (out / "dataset.json").exists():  # killed, or finished by another process, between the last two steps
            shutil.rmtree(out / UNFINISHED)
            return out
        try:
            _Preparation(out, origin, settings, tokenizer, index_of).run(workers, fast)
        except BrokenProcessPool as error:
            raise ValueError(
                "a tokenizer process was killed, probably for its memory; run the same command again to go on, "
                "perhaps with fewer --workers"
            ) from error
    return out


class _Preparation:
    """The state of one preparation, on disk in out/.preparing and here."""

    def __init__(self, out: Path, origin: Source, settings: dict, tokenizer: str, part: tuple[int, int]) -> None:
        self.out, self.origin, self.settings, self.part = out, origin, settings, part
        self.val_tokens = settings["validation"].get("tokens", 0) if part[0] == 0 else 0
        self.fraction = settings["validation"].get("fraction", 0.0)
        # An ordinal of the source decides, unless whole files were divided between the parts.
        self.part_by_ordinal = part if part[1] > origin.parts else (0, 1)
        self.state_file = out / UNFINISHED / "state.json"
        if not self.state_file.exists():
            self._save_tokenizer(tokenizer)
        loaded = load_tokenizer(str(out))
        self.vocab_size, self.eot_id = vocabulary_size(loaded), loaded.eos_token_id
        self.tokenizer_sha256 = tokenizer_sha256(loaded)
        self.dtype = token_dtype(self.vocab_size)
        state = json.loads(self.state_file.read_text("utf-8")) if self.state_file.exists() else {}
        self.progress = Progress(**state.get("progress", {}))
        self.documents: dict[str, int] = state.get("documents", dict.fromkeys(SPLITS, 0))
        self.writers = {
            name: ShardWriter(out, name, dtype=self.dtype, shard_tokens=settings["shard_tokens"],
                              record=state.get("shards", {}).get(name))
            for name in SPLITS
        }  # fmt: skip
        self._save()

    def _save_tokenizer(self, tokenizer: str) -> None:
        if not tokenizer.startswith("train:"):
            load_tokenizer(tokenizer).save_pretrained(self.out)
        else:
            entries = int(tokenizer.removeprefix("train:"))
            trained = encoding.train_bpe(self._training_texts(), entries)
            if len(trained) != entries:
                raise ValueError(
                    f"the text gives a tokenizer of only {len(trained):,} of {entries:,} entries; ask for fewer"
                )
            trained.save_pretrained(self.out)
        if not (self.out / "tokenizer.json").exists():
            raise ValueError(f"the tokenizer {tokenizer!r} has no tokenizer.json (no fast form); convert it first")

    def _training_texts(self) -> Iterator[str]:
        skip, left = self.val_tokens * LONGEST_TOKEN_BYTES, BPE_TRAINING_BYTES
        for document in self.origin.documents():
            text = document.text
            if document.skipped or encoding.reason_to_skip(text) or is_validation(text, self.fraction):
                continue
            for chunk in encoding.chunks(text):
                if skip < len(chunk):
                    yield chunk[skip:].decode(errors="ignore")
                    left -= len(chunk)
                skip = max(0, skip - len(chunk))
            if left < 0:
                return

    def run(self, workers: int, fast: bool) -> None:
        tokenizer_file = self.out / "tokenizer.json"
        if fast:
            encoding.check_fast(tokenizer_file, _sample(self.origin))
        self._check_disk()
        work = batches(
            self.origin.documents(self.progress.position), deepcopy(self.progress), fraction=self.fraction,
            part=self.part_by_ordinal, encode=encoding.exact_encoder(tokenizer_file),
        )  # fmt: skip
        saved, whole_shard = time.monotonic(), False
        with tqdm(unit=" tokens", unit_scale=True, initial=self.tokens, desc=self.out.name, mininterval=0.5) as bar:
            for batch, ids in encoded(work, workers, (tokenizer_file, self.eot_id, self.dtype, fast)):
                with self._explained():
                    whole_shard |= self._write(ids)
                    self.progress = batch.progress or self.progress
                    if batch.progress and (whole_shard or time.monotonic() - saved > CHECKPOINT_SECONDS):
                        self._save()
                        saved, whole_shard = time.monotonic(), False
                if batch.done:
                    bar.total = int(self.tokens / batch.done)  # what remains, as far as can be known
                bar.update(self.tokens - bar.n)
        with self._explained():
            self._finish()

    @property
    def tokens(self) -> int:
        return sum(writer.tokens for writer in self.writers.values())

    def _write(self, ids: dict[str, np.ndarray]) -> bool:
        """Append a batch's ids; the stream's first val_tokens go to validation. True if a shard became whole."""
        val, train = ids["val"], ids["train"]
        room = self.val_tokens - self.writers["val"].tokens
        if room > 0:
            val, train = np.split(train, [room])
        if len(train) and train[0] != self.eot_id and not self.writers["train"].tokens:
            train = np.concatenate([np.array([self.eot_id], self.dtype), train])  # the rest of the document cut in two
        whole = False
        for name, part in ("train", train), ("val", val):
            self.documents[name] += int(np.count_nonzero(part == self.eot_id))
            whole |= self.writers[name].write(part)
        return whole

    def _save(self) -> None:
        shards = {name: writer.record() for name, writer in self.writers.items()}
        state = {"settings": self.settings, "progress": vars(self.progress), "documents": self.documents}
        _write_json(self.state_file, {**state, "shards": shards}, self.state_file.parent)

    def _finish(self) -> None:
        skipped = self.progress.skipped
        if not self.writers["train"].tokens:
            raise ValueError(
                f"no training tokens: {self.documents['val']} validation documents and {skipped} skipped; "
                "give more text, a smaller validation split, or another --text-field, and delete the folder"
            )
        for writer in self.writers.values():
            writer.finish_shard()
        splits = {
            name: {"tokens": writer.tokens, "documents": self.documents[name], "shards": writer.shards}
            for name, writer in self.writers.items()
        }
        _write_json(self.out / "dataset.json", {
            "format_version": FORMAT_VERSION, "tokenizer_sha256": self.tokenizer_sha256, "vocab_size": self.vocab_size,
            "eot_id": self.eot_id, **self.settings, "splits": splits, "skipped": skipped,
        }, self.out / UNFINISHED)  # fmt: skip
        shutil.rmtree(self.out / UNFINISHED)
        print(f"{self.out}: " + ", ".join(f"{name} {s['tokens']:,} tokens in {s['documents']:,} documents"
              for name, s in splits.items()) + f"; skipped {skipped}", file=sys.stderr)  # fmt: skip
        if not splits["val"]["tokens"]:
            print("no document fell into validation; --val-tokens takes the first tokens instead", file=sys.stderr)

    def _check_disk(self) -> None:
        itemsize = self.dtype.itemsize
        written = self.tokens * itemsize
        estimate = (self.origin.token_bytes or 0) / self.part_by_ordinal[1] * itemsize / 2
        needed = max(estimate - written, min(estimate, self.settings["shard_tokens"] * itemsize)) + SPARE_DISK
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise ValueError(
                f"{self.out} has {free / 1e9:,.1f} GB free, the shards need about {needed / 1e9:,.1f} GB; "
                "free some, or choose another --out"
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"writing to {self.out} failed ({error.strerror}); what is finished is kept: make room and run the "
                "same command again"
            ) from error


def _sample(origin: Source) -> Iterator[str]:
    """The beginning of the source, for the comparison of encoders."""
    left = 2**21
    for document in origin.documents():
        if left <= 0:
            return
        if not document.skipped:
            text = next(encoding.chunks(document.text), b"").decode(errors="ignore")
            left -= len(text)
            yield text


def _parse_part(part: str) -> tuple[int, int]:
    index, _, count = part.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"part {part!r} is not I/N with 0 <= I < N; the parts of 4 are 0/4, 1/4, 2/4 and 3/4")
    return int(index), int(count)


def _validation(origin: Source, tokens: int | None, fraction: float | None) -> dict:
    if tokens is not None and fraction is not None:
        raise ValueError(f"val_tokens {tokens} and val_fraction {fraction} are two ways to one split; give one")
    if (tokens or 0) < 0 or not 0 <= (fraction or 0) < 1:
        raise ValueError(f"val_tokens {tokens} must be 0 or more, val_fraction {fraction} from 0 to below 1")
    if tokens is None and fraction is None and origin.one_document:
        tokens = int((origin.token_bytes or 0) / 2 / 10)  # a hash cannot divide one document: about its first tenth
    if tokens is not None:
        return {"tokens": tokens}
    return {"fraction": fraction if fraction is not None else 0.1 if origin.record["name"] == "python-docs" else 0.01}


def _recorded(out: Path) -> dict:
    """The settings of what is in the folder already; {} where nothing is."""
    for file in out / "dataset.json", out / UNFINISHED / "state.json":
        if file.exists():
            try:
                content = json.loads(file.read_text("utf-8"))
                return content.get("settings", content)
            except ValueError as error:
                raise ValueError(f"{file} is broken ({error}); delete {out} and prepare again") from error
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder")
    if out.exists() and any(out.iterdir()) and not (out / UNFINISHED).exists():
        raise ValueError(f"{out} is not empty and holds no dataset; name a new folder")
    return {}


def _refuse_other_settings(out: Path, recorded: dict, settings: dict) -> None:
    settings = json.loads(json.dumps(settings))
    differing = [key for key in settings if recorded and recorded.get(key) != settings[key]]
    if differing:
        was = "; ".join(f"{key} is {recorded.get(key)}, asked for {settings[key]}" for key in differing)
        raise ValueError(f"{out} holds another preparation ({was}); name another folder, or delete this one")


@contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    """Two writers in one folder would destroy each other's shards. The lock ends with the process, however it ends."""
    import fcntl

    try:
        (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
        lock = open(out / UNFINISHED / "lock", "w")
    except OSError as error:
        raise ValueError(f"{out} cannot be written ({error.strerror}); name another --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is preparing {out}; wait for it, or name another --out") from error
        yield


def _write_json(path: Path, content: dict, aside: Path) -> None:
    """Written and synced aside, then renamed: the file is the old one or the new one, never half of it."""
    temporary = aside / f"{path.name}.new"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the names are the folder's content, the shards' among them
    os.fsync(folder)
    os.close(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpt2repro.data.prepare", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--source", required=True, choices=SOURCES)
    add("--files", nargs="+", metavar="GLOB", help=".txt .md .jsonl .jsonl.gz .jsonl.zst .parquet (--source files)")
    add("--dataset", help="a Hub id, or a local folder laid out like one (--source hub)")
    add("--name", dest="config", help="the dataset's configuration, such as sample-100BT")
    add("--split", default="train", help="the dataset's split (default: train)")
    add("--text-field", default="text", help="the field that holds the text (default: text)")
    add("--revision", help="the dataset's commit or branch (default: the newest, recorded)")
    add("--tokenizer", required=True, help="a folder, a Hub id, or train:N")
    add("--out", required=True, metavar="DIR")
    add("--val-tokens", type=int, metavar="N", help="validation = the first N tokens")
    add(
        "--val-fraction", type=float, metavar="F", help="validation = this share of documents, by hash (default: 0.01)"
    )
    add("--workers", type=int, default=1, metavar="N", help="tokenizer processes (default: 1)")
    add("--shard-tokens", type=int, default=100_000_000, metavar="N", help="tokens a shard (default: 100,000,000)")
    add("--part", default="0/1", metavar="I/N", help="prepare only the I-th, from 0, of N disjoint parts")
    add("--fast", action="store_true", help="encode with gigatoken, where it gives the same ids")
    try:
        prepare(**vars(parser.parse_args(arguments)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
