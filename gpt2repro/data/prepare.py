"""Documents -> token shards, without babysitting: any number of workers and any number of kills give the same bytes.

    python -m gpt2repro.data.prepare --source python-docs --tokenizer train:4096 --out data/python-docs
    python -m gpt2repro.data.prepare --source files --files 'my/*.jsonl.zst' --tokenizer gpt2 --out data/my --workers 8
    python -m gpt2repro.data.prepare --source fineweb-edu --tokenizer gpt2 --out data/fineweb-edu --workers 16 --fast

A folder comes out (see shards.py): shards of --shard-tokens tokens, the tokenizer, and dataset.json when all is done.
Killed or out of disk, the same command goes on where it was: `.preparing/state.json` says what was safely on disk and
where in the source that was. This process reads, checks and cuts documents and writes tokens; workers only encode.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from gpt2repro.data import encoding
from gpt2repro.data.shards import FORMAT_VERSION, SPLITS, UNFINISHED, ShardWriter, load_tokenizer, tokenizer_record
from gpt2repro.data.sources import (
    FILES,
    NOT_TEXT,
    NOT_UTF8,
    SOURCES,
    WITHOUT_CHOICES,
    Document,
    Source,
    open_source,
)

BATCH_BYTES = 2**20  # of text to a worker at a time: a second of its work
CHECKPOINT_SECONDS = 5.0  # at most this much work is done twice
BPE_TRAINING_BYTES = 2**28  # more text moves no merge that matters, and the trainer's memory grows with it
SAMPLE_BYTES = 2**21  # of the source, for the comparison of encoders
LONGEST_TOKEN_BYTES = 8  # on average, generously: how much text --val-tokens may take, when there is no tokenizer yet
SPARE_DISK = 2**28
LEFT_OUT = (encoding.EMPTY, NOT_TEXT, NOT_UTF8)


@dataclass
class Batch:
    """Work for one worker, and how far the source is read after it."""

    pieces: list[tuple[str, bytes, bool]] = field(default_factory=list)  # split, text, whether it begins a document
    bytes: int = 0
    progress: dict | None = None  # None: this batch ends inside a document, nothing can restart from here
    done: float | None = None


def batches(
    documents: Iterable[Document], progress: dict, *, val_fraction: float, encode: encoding.Encode
) -> Iterator[Batch]:
    """Documents checked, assigned to a split, cut, and gathered to batches. `progress` moves along."""
    batch = Batch()
    for document in documents:
        split = encoding.split_of(document, val_fraction)
        if split in LEFT_OUT:
            progress["skipped"][split] += 1
        else:
            for index, piece in enumerate(encoding.cut_document(document.text, encode)):
                if batch.bytes >= BATCH_BYTES:
                    yield batch
                    batch = Batch()
                batch.pieces.append((split, piece, index == 0))
                batch.bytes += len(piece)
        progress["position"], batch.done = document.position, document.done
        if batch.bytes >= BATCH_BYTES:
            batch.progress = deepcopy(progress)
            yield batch
            batch = Batch()
    batch.progress = deepcopy(progress)
    yield batch


# ---------------------------------------------------------------------------------------------------- workers

_worker: Any = None  # (encode, eot_id), set by _start_worker


def _start_worker(tokenizer_file: Path, eot_id: int, fast: bool) -> None:
    """Load the encoder, and end with the main process: after its SIGKILL nobody else would end a worker."""
    global _worker
    _worker = (encoding.fast_encoder if fast else encoding.exact_encoder)(tokenizer_file), eot_id
    if parent := multiprocessing.parent_process():

        def end_with_parent() -> None:
            parent.join()
            os._exit(1)

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
        threading.Thread(target=end_with_parent, daemon=True).start()


def _encode(pieces: list[tuple[str, bytes, bool]]) -> dict[str, np.ndarray]:
    """The ids of each split, <|endoftext|> before each piece that begins a document."""
    encode, eot_id = _worker
    ids: dict[str, list] = {name: [np.empty(0, np.uint32)] for name in SPLITS}
    for split, text, begins in pieces:
        ids[split] += [np.array([eot_id] * begins, np.uint32), encode(text.decode())]
    return {name: np.concatenate(parts) for name, parts in ids.items()}


def encoded(work: Iterator[Batch], workers: int, settings: tuple) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """Each batch with its ids, in order; a few batches a worker are under way at a time."""
    # spawn: a forked copy of a process that has threads (tokenizers has) may hang
    processes = partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"))
    start = processes if workers > 1 else ThreadPoolExecutor
    with start(workers, initializer=_start_worker, initargs=settings) as pool:
        pending: deque[tuple[Batch, Future]] = deque()
        for batch in work:
            pending.append((batch, pool.submit(_encode, batch.pieces)))
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
    val_tokens: int | None = None,
    val_fraction: float | None = None,
    workers: int = 1,
    shard_tokens: int = 100_000_000,
    part: str = "0/1",
    fast: bool = False,
    **source_options: Any,
) -> Path:
    """Prepare `source` into the folder `out`, or go on with it. Returns the folder; ValueError says what is wrong.

    tokenizer: a folder, a Hub id, or train:N for a byte-level BPE of N entries trained on the training documents.
    Validation: the first val_tokens tokens, or the val_fraction of documents by hash (0.01; python-docs 0.1).
    part: I/N, the I-th (from 0) of N disjoint parts. fast: gigatoken, where it gives the same ids.
    source_options: files, dataset, config, split, text_field, revision, as `open_source` takes them.
    """
    out = Path(out)
    index, _, count = part.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"part {part!r} is not I/N with 0 <= I < N; the parts of 4 are 0/4, 1/4, 2/4 and 3/4")
    if workers < 1 or shard_tokens < 1:
        raise ValueError(f"workers {workers} and shard_tokens {shard_tokens} must be at least 1")
    trained = tokenizer.startswith("train:")
    if trained and not (tokenizer.removeprefix("train:").isdigit() and part == "0/1"):
        raise ValueError(
            f"tokenizer {tokenizer!r}, part {part}: train:N takes a number, such as train:4096, and the whole source; "
            "for parts, train on a sample first and name its folder"
        )
    recorded = _recorded_settings(out)
    if source not in WITHOUT_CHOICES and (revision := recorded.get("source", {}).get("revision")):
        source_options.setdefault("revision", revision)  # go on with the commit that it began with
    origin = open_source(source, part=(int(index), int(count)), **source_options)
    made_with = tokenizer if trained else tokenizer_record(load_tokenizer(tokenizer))["tokenizer_sha256"]
    settings = {
        "source": origin.record,
        "tokenizer": made_with,
        "validation": _validation(origin, val_tokens, val_fraction),
        "shard_tokens": shard_tokens,
        "part": part,
    }
    differing = [key for key in settings if recorded and recorded.get(key) != settings[key]]
    if differing:
        was = "; ".join(f"{key} is {recorded.get(key)}, asked for {settings[key]}" for key in differing)
        raise ValueError(f"{out} holds another preparation ({was}); name another folder, or delete this one")
    if (out / "dataset.json").exists() and not (out / UNFINISHED).exists():
        print(f"{out} is prepared already", file=sys.stderr)
        return out
    try:
        (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
        # Two writers would destroy each other's shards. The lock ends with its process, however that ends.
        with FileLock(out / UNFINISHED / "lock", timeout=0):
            if not (out / "dataset.json").exists():  # else killed, or finished by another process, just before the end
                _Preparation(out, origin, settings, tokenizer).run(workers, fast)
            shutil.rmtree(out / UNFINISHED)
    except Timeout as error:
        raise ValueError(f"another process is preparing {out}; wait for it, or name another --out") from error
    except (OSError, BrokenExecutor) as error:  # a full disk, a killed worker
        raise ValueError(
            f"preparing {out} stopped ({error}); what is finished is kept: mend that, with fewer --workers if memory "
            "ran out, and run the same command again"
        ) from error
    return out


class _Preparation:
    """The state of one preparation, on disk in out/.preparing and here."""

    def __init__(self, out: Path, origin: Source, settings: dict, tokenizer: str) -> None:
        self.out, self.origin, self.settings = out, origin, settings
        self.val_tokens = settings["validation"].get("tokens", 0) if settings["part"].startswith("0/") else 0
        self.val_fraction = settings["validation"].get("fraction", 0.0)
        self.state_file = out / UNFINISHED / "state.json"
        if self.state_file.exists():
            state = json.loads(self.state_file.read_text("utf-8"))
        else:
            self._save_tokenizer(tokenizer)
            state = {"progress": {"position": None, "skipped": dict.fromkeys(LEFT_OUT, 0)}, "splits": {}}
        self.progress: dict = state["progress"]
        self.tokenizer = tokenizer_record(load_tokenizer(str(out)))
        self.eot_id = self.tokenizer["eot_id"]
        self.writers = {
            name: ShardWriter(out, name, state["splits"].get(name), shard_tokens=settings["shard_tokens"],
                              vocab_size=self.tokenizer["vocab_size"], eot_id=self.eot_id)
            for name in SPLITS
        }  # fmt: skip
        self.splits = {name: writer.record for name, writer in self.writers.items()}
        self._save()

    def _save_tokenizer(self, tokenizer: str) -> None:
        if not tokenizer.startswith("train:"):
            load_tokenizer(tokenizer).save_pretrained(self.out)
        else:
            trained = encoding.train_bpe(self._training_texts(), int(tokenizer.removeprefix("train:")))
            trained.save_pretrained(self.out)
        if not (self.out / "tokenizer.json").exists():
            raise ValueError(f"the tokenizer {tokenizer!r} has no tokenizer.json (no fast form); convert it first")

    def _training_texts(self) -> Iterator[str]:
        documents = self.origin.documents()
        train = (document for document in documents if encoding.split_of(document, self.val_fraction) == "train")
        return _beginning(train, BPE_TRAINING_BYTES, skip=self.val_tokens * LONGEST_TOKEN_BYTES)

    def run(self, workers: int, fast: bool) -> None:
        """Go on from the state to the end."""
        tokenizer_file = self.out / "tokenizer.json"
        if fast:
            encoding.check_fast(tokenizer_file, _beginning(self.origin.documents(), SAMPLE_BYTES))
        self._check_disk()
        work = batches(
            self.origin.documents(self.progress["position"]), deepcopy(self.progress),
            val_fraction=self.val_fraction, encode=encoding.exact_encoder(tokenizer_file),
        )  # fmt: skip
        saved, shards = time.monotonic(), self.shards
        with tqdm(unit=" tokens", unit_scale=True, initial=self.tokens, desc=self.out.name, mininterval=0.5) as bar:
            for batch, ids in encoded(work, workers, (tokenizer_file, self.eot_id, fast)):
                self._write(ids["train"], ids["val"])
                self.progress = batch.progress or self.progress
                late = self.shards > shards or time.monotonic() - saved > CHECKPOINT_SECONDS
                if batch.progress and late:
                    self._save()
                    saved, shards = time.monotonic(), self.shards
                if batch.done:
                    bar.total = int(self.tokens / batch.done)  # what remains, as far as can be known
                bar.update(self.tokens - bar.n)
        self._finish()

    @property
    def tokens(self) -> int:
        return sum(record["tokens"] for record in self.splits.values())

    @property
    def shards(self) -> int:
        return sum(len(record["shards"]) for record in self.splits.values())

    def _write(self, train: np.ndarray, val: np.ndarray) -> None:
        """Append a batch's ids; the stream's first val_tokens go to validation."""
        room = self.val_tokens - self.splits["val"]["tokens"]
        if room > 0:
            val, train = np.split(train, [room])
        if len(train) and train[0] != self.eot_id and not self.splits["train"]["tokens"]:
            train = np.insert(train, 0, self.eot_id)  # the rest of the document cut in two
        self.writers["train"].write(train)
        self.writers["val"].write(val)

    def _save(self) -> None:
        for writer in self.writers.values():
            writer.sync()
        _write_json(self.state_file, {"settings": self.settings, "progress": self.progress, "splits": self.splits})

    def _finish(self) -> None:
        skipped = self.progress["skipped"]
        if not self.splits["train"]["tokens"]:
            raise ValueError(
                f"no training tokens: {self.splits['val']['documents']} validation documents and {skipped} skipped; "
                "give more text, a smaller validation split, or another --text-field, and delete the folder"
            )
        for writer in self.writers.values():
            writer.finish_shard()
        record = {"format_version": FORMAT_VERSION, **self.tokenizer, **self.settings, "splits": self.splits}
        _write_json(self.out / "dataset.json", {**record, "skipped": skipped})
        counts = (f"{name} {r['tokens']:,} tokens in {r['documents']:,} documents" for name, r in self.splits.items())
        print(f"{self.out}: {', '.join(counts)}; skipped {skipped}", file=sys.stderr)

    def _check_disk(self) -> None:
        needed = max(0, self.origin.tokens - self.tokens) * self.writers["train"].dtype.itemsize + SPARE_DISK
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise ValueError(
                f"{self.out} has {free / 1e9:,.1f} GB free, the shards need about {needed / 1e9:,.1f} GB; "
                "free some, or choose another --out"
            )


def _beginning(documents: Iterable[Document], limit: int, *, skip: int = 0) -> Iterator[str]:
    """About `limit` bytes of the documents' text, from byte `skip` on."""
    for document in documents:
        for chunk in encoding.chunks(document.text):
            if skip < len(chunk):
                yield chunk[skip:].decode(errors="ignore")
                limit -= len(chunk)
                if limit < 0:
                    return
            skip = max(0, skip - len(chunk))


def _validation(origin: Source, tokens: int | None, fraction: float | None) -> dict:
    if tokens is not None and fraction is not None:
        raise ValueError(f"val_tokens {tokens} and val_fraction {fraction} are two ways to one split; give one")
    if (tokens or 0) < 0 or not 0 <= (fraction or 0) < 1:
        raise ValueError(f"val_tokens {tokens} must be 0 or more, val_fraction {fraction} from 0 to below 1")
    if fraction is not None:
        return {"fraction": fraction}
    if tokens is None and not origin.one_document:
        return {"fraction": 0.1 if origin.record["name"] == "python-docs" else 0.01}
    # A hash cannot divide one document: about its first tenth.
    return {"tokens": int(origin.tokens / 10) if tokens is None else tokens}


def _recorded_settings(out: Path) -> dict:
    """Of what is in the folder already; {} where nothing is."""
    for file in out / "dataset.json", out / UNFINISHED / "state.json":
        if file.exists():
            try:
                content = json.loads(file.read_text("utf-8"))
                return {"splits": content["splits"], **content.get("settings", content)}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{file} is broken, or too old ({error}); delete {out} and prepare again") from error
    if out.is_file() or (out.exists() and any(out.iterdir()) and not (out / UNFINISHED).exists()):
        raise ValueError(f"{out} is no folder, or is not empty and holds no dataset; name a new folder")
    return {}


def _write_json(path: Path, content: dict) -> None:
    """Written and synced aside, then renamed: the file is the old one or the new one, never half of it."""
    aside = path.with_name(f"{path.name}.new")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the names are the folder's content, the shards' among them
    os.fsync(folder)
    os.close(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpt2repro.data.prepare", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--source", required=True, choices=SOURCES)
    add("--files", nargs="+", metavar="GLOB", help=f"{' '.join(FILES)} (--source files)")
    add("--dataset", help="a Hub id, or a local folder laid out like one (--source hub)")
    add("--name", dest="config", help="the dataset's configuration, such as sample-100BT")
    add("--split", help="the dataset's split (default: train)")
    add("--text-field", help="the field that holds the text (default: text)")
    add("--revision", help="the dataset's commit or branch (default: the newest, recorded)")
    add("--tokenizer", required=True, help="a folder, a Hub id, or train:N")
    add("--out", required=True, metavar="DIR")
    add("--val-tokens", type=int, metavar="N", help="validation = the first N tokens")
    add("--val-fraction", type=float, metavar="F", help="validation = this share, by hash (default: 0.01)")
    add("--workers", type=int, metavar="N", help="tokenizer processes (default: 1)")
    add("--shard-tokens", type=int, metavar="N", help="tokens a shard (default: 100,000,000)")
    add("--part", metavar="I/N", help="prepare only the I-th, from 0, of N disjoint parts")
    add("--fast", action="store_true", help="encode with gigatoken, where it gives the same ids")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    try:
        prepare(**given)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
