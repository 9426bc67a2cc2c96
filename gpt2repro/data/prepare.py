"""Preparation of a dataset: documents to token shards, the same bytes for any number of workers and of restarts.

    python -m gpt2repro.data.prepare --source python-docs --tokenizer train:4096 --out data/python-docs
    python -m gpt2repro.data.prepare --source files --files 'my/*.jsonl.zst' --tokenizer gpt2 --out data/my --workers 8
    python -m gpt2repro.data.prepare --source fineweb-edu --tokenizer gpt2 --out data/fineweb-edu --workers 16 --fast

The folder (see shards.py) gets shards of --shard-tokens tokens, the tokenizer, and at the end dataset.json. After a
kill or a full disk the same command resumes: `.preparing/state.json` records what is safely on disk and the position
in the source. This process reads, checks and cuts documents and writes tokens; workers only encode.
"""

import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gpt2repro import command
from gpt2repro.data import encoding, shards, sources
from gpt2repro.data.published import ADDRESS
from gpt2repro.data.shards import UNFINISHED, ShardWriter, load_tokenizer, tokenizer_record
from gpt2repro.data.sources import Document, Source, open_source
from gpt2repro.data.stream import SPLITS
from gpt2repro.files import take_lock
from gpt2repro.hub.upload import upload, writable_repo

BATCH_BYTES = 2**20  # of text to a worker at a time: a second of its work
SKIPPED_BYTES = 2**7  # what a skipped record counts in a batch: a batch of these alone must end as well
CHECKPOINT_SECONDS = 5.0  # at most this much work is repeated after a kill
BPE_TRAINING_BYTES = 2**28  # more text changes no merge that matters, and the trainer's memory grows with it
SAMPLE_BYTES = 2**21  # of the source, for the comparison of encoders
LONGEST_TOKEN_BYTES = 8  # on average, generously: how much text --val-tokens may take, before there is a tokenizer
SPARE_DISK = 2**28
MOST_WORKERS = 1024
SKIPPED = (encoding.EMPTY, sources.NOT_TEXT, sources.NOT_UTF8)

Piece = tuple[str, bytes, bool]  # its split or why it is skipped, text, whether <|endoftext|> precedes it
Encoded = tuple[dict[str, np.ndarray], Counter[str], Any]  # ids by split, skipped records, position in the source


def batches_of(
    documents: Iterable[Document], val_fraction: float, encode: encoding.Encode
) -> Iterator[tuple[list[Piece], Any]]:
    """Documents, checked, assigned to a split, cut, and gathered to about BATCH_BYTES.

    With each batch the position of the source after it; None where the batch ends inside a document.
    """
    batch: list[Piece] = []
    size, named = 0, {*SPLITS}
    for document in documents:
        split = encoding.split_of(document, val_fraction)
        if split not in named:
            named.add(split)
            tqdm.write(f"{document.where}: skipped as {split}; others like it are counted", file=sys.stderr)
        texts = encoding.cut_document(document.text, encode) if split in SPLITS else iter([b""])
        for index, text in enumerate(texts):
            if size >= BATCH_BYTES:
                yield batch, None
                batch, size = [], 0
            batch.append((split, text, index == 0))
            size += len(text) or SKIPPED_BYTES
        if size >= BATCH_BYTES:
            yield batch, document.position
            batch, size = [], 0
    yield batch, None


# ---------------------------------------------------------------------------------------------------- workers

_worker: Any = None  # (encode, eot_id), set by _start_worker


def _start_worker(tokenizer_file: Path, eot_id: int, fast: bool) -> None:
    """Load the encoder, and end with the main process: after its SIGKILL nothing else would end a worker."""
    global _worker
    _worker = (encoding.fast_encoder if fast else encoding.exact_encoder)(tokenizer_file), eot_id
    if parent := multiprocessing.parent_process():

        def end_with_parent() -> None:
            parent.join()
            os._exit(1)

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process answers Ctrl-C
        threading.Thread(target=end_with_parent, daemon=True).start()


def _encode(batch: list[Piece], position: Any) -> Encoded:
    """In a worker: the ids of a batch, <|endoftext|> before each document; the position is passed on."""
    encode, eot_id = _worker
    ids: dict[str, list] = {name: [np.empty(0, np.uint32)] for name in SPLITS}
    skipped: Counter[str] = Counter()
    for split, text, begins in batch:
        if split in SPLITS:
            ids[split] += [np.array([eot_id] * begins, np.uint32), encode(text.decode())]
        else:
            skipped[split] += 1
    return {name: np.concatenate(parts) for name, parts in ids.items()}, skipped, position


def encoded(batches: Iterable[tuple[list[Piece], Any]], workers: int, settings: tuple) -> Iterator[Encoded]:
    """The batches' ids, in order; a few batches per worker are in progress at a time."""
    # spawn: a forked copy of a process that has threads (tokenizers has) may hang
    processes = partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"))
    start = processes if workers > 1 else ThreadPoolExecutor
    with start(workers, initializer=_start_worker, initargs=settings) as pool:
        futures = (pool.submit(_encode, *batch) for batch in batches)
        try:
            pending = deque(islice(futures, 3 * workers))
            while pending:
                yield pending.popleft().result()
                pending.extend(islice(futures, 1))
        except BrokenExecutor:  # a killed worker. The pool waits for ever for one that was being started meanwhile.
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


# ---------------------------------------------------------------------------------------------------- a preparation


def prepare(
    *, source: str, tokenizer: str, out: str | Path, val_tokens: int | None = None, val_fraction: float | None = None,
    workers: int = 1, shard_tokens: int = 100_000_000, part: str = "0/1", fast: bool = False, **source_options: Any,
) -> Path:
    """Prepare `source` into the folder `out`, or resume it. Returns the folder.

    tokenizer: a folder, a Hub id, or train:N for a byte-level BPE of N entries trained on the training documents.
    Validation: the first val_tokens tokens, or the val_fraction of documents by hash (0.01; python-docs 0.1); of
    source text the last tenth.
    part: I/N, the I-th (from 0) of N disjoint parts. fast: gigatoken, where it gives the same ids.
    source_options: files, dataset, config, split, text_field, revision, as `open_source` takes them.

    Raises:
        ValueError: options that contradict each other, a source, tokenizer or folder that cannot be used, a full disk.
    """
    out = Path(os.path.expanduser(out))
    fraction = re.fullmatch(r"(\d{1,9})/(\d{1,9})", part)
    if not fraction or int(fraction[1]) >= int(fraction[2]):
        raise ValueError(f"part {part!r} is not I/N with 0 <= I < N; the parts of 4 are 0/4, 1/4, 2/4 and 3/4")
    if not 1 <= workers <= MOST_WORKERS or shard_tokens < 1:
        numbers = f"workers {workers} and shard_tokens {shard_tokens}"
        raise ValueError(f"{numbers} must be at least 1, and workers at most {MOST_WORKERS}")
    trained = tokenizer.startswith("train:")
    if trained and not (tokenizer.removeprefix("train:").isdigit() and part == "0/1"):
        advice = "train:N takes a number and the whole source; for parts, train on a sample first and name its folder"
        raise ValueError(f"tokenizer {tokenizer!r} with part {part}: {advice}")
    recorded = _recorded_settings(out)
    if source not in sources.WITHOUT_CHOICES and (revision := recorded.get("source", {}).get("revision")):
        source_options.setdefault("revision", revision)  # resume with the commit that it began with
    origin = open_source(source, part=(int(fraction[1]), int(fraction[2])), **source_options)
    validation = _validation(origin, val_tokens, val_fraction)
    if not (out / "dataset.json").exists():
        _check_disk(out, origin.tokens)
    origin.record_contents()
    settings = {
        "source": origin.record,
        "tokenizer": tokenizer if trained else tokenizer_record(load_tokenizer(tokenizer))["tokenizer_sha256"],
        "validation": validation,
        "shard_tokens": shard_tokens,
        "part": part,
    }
    differing = [key for key in settings if recorded and recorded.get(key) != settings[key]]
    if "source" in differing and sources.same_source(recorded["source"], origin.record):
        differing.remove("source")
    if differing:
        was = "; ".join(f"{key} is {recorded.get(key)}, asked for {settings[key]}" for key in differing)
        raise ValueError(f"{out} holds another preparation ({was}); name another folder, or delete this one")
    existed = out.exists()
    try:
        (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
        # Two writers would destroy each other's shards. The lock ends with its process, however that ends.
        with take_lock(out / UNFINISHED / "lock"):
            if (out / "dataset.json").exists():
                print(f"{out} is prepared already", file=sys.stderr)
            else:
                _prepare(out, origin, settings, tokenizer, workers=workers, fast=fast, existed=existed)
            shutil.rmtree(out / UNFINISHED)
    except BlockingIOError as error:
        raise ValueError(f"another process is preparing {out}; wait for it, or name another --out") from error
    except (OSError, BrokenExecutor) as error:  # a full disk, a killed worker
        advice = "free disk, or use fewer --workers if memory ran out, and run the same command again to resume"
        raise ValueError(f"preparing {out} stopped ({error}): {advice}") from error
    return out


def _prepare(out: Path, *what: Any, workers: int, fast: bool, existed: bool) -> None:
    """Prepare or resume. What is refused before there is progress to keep leaves nothing behind."""
    preparation = None
    try:
        preparation = _Preparation(out, *what)
        preparation.run(workers, fast)
    except ValueError:
        if preparation is None or preparation.position is None:
            shutil.rmtree(out)
            if existed:
                out.mkdir()
        raise


class _Preparation:
    """The state of one preparation: writers, position in the source, skipped records; saved in out/.preparing."""

    def __init__(self, out: Path, origin: Source, settings: dict, tokenizer: str) -> None:
        self.out, self.origin, self.settings = out, origin, settings
        self.val_tokens = settings["validation"].get("tokens", 0) if settings["part"].startswith("0/") else 0
        self.val_fraction = settings["validation"].get("fraction", 0.0)
        self.state_file, self.tokenizer_file = out / UNFINISHED / "state.json", out / "tokenizer.json"
        named = not (tokenizer.startswith("train:") or os.path.isdir(os.path.expanduser(tokenizer)))
        self.tokenizer_name = {"tokenizer_name": tokenizer} if named else {}  # a folder's path would name a machine
        state = {"progress": {"position": None, "skipped": dict.fromkeys(SKIPPED, 0)}, "splits": {}}
        if self.state_file.exists():
            state = shards.read_record(self.state_file)
        else:
            self._save_tokenizer(tokenizer)
        self.position, self.skipped = state["progress"]["position"], Counter(state["progress"]["skipped"])
        self.tokenizer = tokenizer_record(load_tokenizer(str(out)))
        self.eot_id = self.tokenizer["eot_id"]
        new_writer = partial(ShardWriter, out, vocab_size=self.tokenizer["vocab_size"], eot_id=self.eot_id)
        self.train, self.val = (
            new_writer(name, state["splits"].get(name), shard_tokens=settings["shard_tokens"]) for name in SPLITS
        )
        self.splits = {"train": self.train.record, "val": self.val.record}
        self._save()

    def _save_tokenizer(self, tokenizer: str) -> None:
        if tokenizer.startswith("train:"):
            documents = self.origin.documents()
            train = (document for document in documents if encoding.split_of(document, self.val_fraction) == "train")
            texts = _sample(train, BPE_TRAINING_BYTES, skip=self.val_tokens * LONGEST_TOKEN_BYTES)
            made = encoding.train_bpe(texts, int(tokenizer.removeprefix("train:")))
        else:
            made = load_tokenizer(tokenizer)
        try:
            made.save_pretrained(self.out)
        except Exception as error:  # of the tokenizers library, where the disk is full
            raise OSError(str(error)) from error
        if not self.tokenizer_file.exists():
            raise ValueError(f"the tokenizer {tokenizer!r} has no tokenizer.json (no fast form); convert it first")

    def run(self, workers: int, fast: bool) -> None:
        """Continue from the state to the end."""
        if fast:
            encoding.check_fast(self.tokenizer_file, _sample(self.origin.documents(), SAMPLE_BYTES))
        exact = encoding.exact_encoder(self.tokenizer_file)
        batches = batches_of(self.origin.documents(self.position), self.val_fraction, exact)
        tokens, saved_shards = self._written()
        saved, about = time.monotonic(), int(self.origin.tokens) or None
        with tqdm(total=about, unit=" tokens", unit_scale=True, initial=tokens, desc=self.out.name) as bar:
            for ids, skipped, position in encoded(batches, workers, (self.tokenizer_file, self.eot_id, fast)):
                self._write(**ids)
                self.skipped.update(skipped)
                tokens, finished = self._written()
                bar.update(tokens - bar.n)
                if position and (finished > saved_shards or time.monotonic() - saved > CHECKPOINT_SECONDS):
                    self.position = position
                    self._save()
                    saved, saved_shards = time.monotonic(), finished
        self._finish()

    def _written(self) -> tuple[int, int]:
        """Tokens and finished shards of both splits."""
        records = self.splits.values()
        return sum(record["tokens"] for record in records), sum(len(record["shards"]) for record in records)

    def _write(self, train: np.ndarray, val: np.ndarray) -> None:
        """Append a batch's ids; the stream's first val_tokens become validation."""
        room = self.val_tokens - self.val.record["tokens"]
        if room > 0:
            val, train = np.split(train, [room])
        if len(train) and train[0] != self.eot_id and not self.train.record["tokens"]:
            train = np.insert(train, 0, self.eot_id)  # the rest of a document that begins in validation
        self.train.write(train)
        self.val.write(val)

    def _save(self) -> None:
        self.train.flush()
        self.val.flush()
        progress = {"position": self.position, "skipped": self.skipped}
        shards.write_record(self.state_file, {"settings": self.settings, "progress": progress, "splits": self.splits})

    def _finish(self) -> None:
        if not self.train.record["tokens"]:
            others = f"{self.val.record['documents']} validation documents and {dict(self.skipped)} skipped"
            advice = "give more text, a smaller validation split, or another --text-field, and delete the folder"
            raise ValueError(f"no training tokens: {others}; {advice}")
        self.train.finish_shard()
        self.val.finish_shard()
        record = {**self.tokenizer, **self.settings, **self.tokenizer_name, "splits": self.splits}
        shards.write_record(self.out / "dataset.json", {**record, "skipped": self.skipped})
        counts = (f"{name} {r['tokens']:,} tokens in {r['documents']:,} documents" for name, r in self.splits.items())
        print(f"{self.out}: {', '.join(counts)}; skipped {dict(self.skipped)}", file=sys.stderr)


def _sample(documents: Iterable[Document], limit: int, *, skip: int = 0) -> Iterator[str]:
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
    """The rule for the validation split: {"tokens": N} or {"fraction": F}."""
    if tokens is not None and fraction is not None:
        raise ValueError(f"val_tokens {tokens} and val_fraction {fraction} are two ways to one split; give one")
    if (tokens or 0) < 0 or not 0 <= (fraction or 0) < 1:
        raise ValueError(f"val_tokens {tokens} must be 0 or more, val_fraction {fraction} from 0 to below 1")
    if origin.record["name"] == "text":
        if tokens is not None or fraction is not None:
            raise ValueError("source text has its last tenth for validation: leave val_tokens and val_fraction out")
        return {"last": 0.1}
    if fraction is not None:
        return {"fraction": fraction}
    if tokens is None and not origin.one_document:
        return {"fraction": 0.1 if origin.record["name"] == "python-docs" else 0.01}
    # A hash cannot divide one document: about its first tenth.
    return {"tokens": int(origin.tokens / 10) if tokens is None else tokens}


def _check_disk(out: Path, tokens: float) -> None:
    """Refuse a disk that the shards would fill; those of an interrupted preparation are there already."""
    there = sum(path.stat().st_size for path in out.rglob("*.npy"))
    needed = 2 * tokens + SPARE_DISK - there  # bytes; twice the tokens' for more than 65,536 ids
    free = shutil.disk_usage(next(path for path in (out, *out.absolute().parents) if path.exists())).free
    if free < needed:
        has = f"{out} has {free / 1e9:,.1f} GB free, the shards need about {needed / 1e9:,.1f} GB"
        raise ValueError(f"{has}; free some, or choose another --out")


def _recorded_settings(out: Path) -> dict:
    """The settings of what is in the folder; {} where there is nothing."""
    for file in out / "dataset.json", out / UNFINISHED / "state.json":
        if file.exists():
            content = shards.read_record(file)
            return content.get("settings", content)
    if out.is_file() or (out.exists() and any(out.iterdir()) and not (out / UNFINISHED).exists()):
        raise ValueError(f"{out} is no folder, or is not empty and holds no dataset; name a new folder")
    return {}


def main(argv: list[str] | None = None) -> int:
    parser = command.Parser(str(__doc__).splitlines()[0], prog="python -m gpt2repro.data.prepare")
    add = parser.add_argument
    add("--source", required=True, choices=sources.SOURCES)
    add("--files", nargs="+", metavar="GLOB", help=f"{' '.join(sources.FILES)} (--source files)")
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
    add("--push", metavar="OWNER/NAME", help="upload the folder to this dataset of the Hub; a new one is private")
    options = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}

    def work() -> None:
        push = options.pop("push", None)
        repo_id = push and writable_repo(push, repo_type="dataset")  # hours before it is needed
        out = prepare(**options)
        if repo_id:
            shards.check_contents(shards.open_dataset(out))
            upload(out, repo_id, message="Upload a prepared dataset", repo_type="dataset")
            command.say(f"dataset_dir: {ADDRESS}{repo_id}")

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
