"""Throughput of tokenisation, beside build-nanogpt's way, and of loading.

    python -m benchmarks.data_throughput --corpus 'corpus/train-00.jsonl.zst' --tokenizer gpt2 [--json F]
    taskset --cpu-list 0 python -m benchmarks.data_throughput              # loading, on one core

Tokenisation (needs the packages gigatoken and tiktoken): every document of the corpus once. The encoders alone on one
core; build-nanogpt's way, a pool of processes with tiktoken and one document a task; and the whole of `prepare`, less
the time that it takes for one document (start of workers and tokenizer).
Loading: from opening a dataset to its first batch, and random windows of 1,024 tokens from the page cache.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.measuring import benchmark_parser, finish, print_row
from gpt2repro import command
from gpt2repro.data.encoding import exact_encoder, fast_encoder
from gpt2repro.data.loader import TrainLoader
from gpt2repro.data.order import WindowOrder
from gpt2repro.data.prepare import prepare
from gpt2repro.data.shards import load_tokenizer, open_dataset
from gpt2repro.data.sources import open_source

SHARD_TOKENS = 100_000_000


def tokenisation(corpus: str, tokenizer: str, folder: Path) -> Iterator[tuple[str, dict]]:
    """For each way its tokens, seconds and rate."""
    load_tokenizer(tokenizer).save_pretrained(folder)
    documents = open_source("files", files=[corpus]).documents()
    texts = [bytes(document.text).decode() for document in documents if not document.skipped]
    for name, encoder in ("tokenizers", exact_encoder), ("gigatoken, cold", fast_encoder):
        encode, began = encoder(folder / "tokenizer.json"), time.perf_counter()
        tokens = sum(len(encode(text)) for text in texts)
        yield f"{name}, alone", rate(tokens, time.perf_counter() - began)
    for processes in 1, 2:
        yield f"build-nanogpt's way, {processes} process(es)", build_nanogpt_way(texts, processes, folder)
    one = folder / "one.jsonl"
    one.write_text(json.dumps({"text": texts[0]}) + "\n", encoding="utf-8")
    for workers, fast in (1, False), (1, True), (2, False), (2, True):
        name = f"prepare{' --fast' if fast else ''}, {workers} worker(s)"
        options = {"source": "files", "tokenizer": tokenizer, "val_tokens": 0, "workers": workers, "fast": fast}
        began = time.perf_counter()
        prepare(files=[str(one)], out=folder / name / "one", **options)
        started = time.perf_counter()
        dataset = prepare(files=[corpus], out=folder / name / "all", **options)
        seconds = (time.perf_counter() - started) - (started - began)
        yield name, rate(open_dataset(dataset).split("train").tokens, seconds)


def rate(tokens: int, seconds: float) -> dict[str, float]:
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}


def build_nanogpt_way(texts: list[str], processes: int, folder: Path) -> dict[str, float]:
    """Its fineweb.py: the main process fills a shard with the ids that the pool returns."""
    with multiprocessing.Pool(processes) as pool:
        pool.map(tiktoken_document, ["warm-up"] * processes)
        began, shard, filled = time.perf_counter(), np.empty(SHARD_TOKENS, np.uint16), 0
        for ids in pool.imap(tiktoken_document, texts, chunksize=16):
            shard[filled : filled + len(ids)] = ids
            filled += len(ids)
        np.save(folder / "build_nanogpt.npy", shard[:filled])
        return rate(filled, time.perf_counter() - began)


def tiktoken_document(text: str) -> np.ndarray:
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")  # downloaded once, then kept in memory
    return np.array([encoding.eot_token, *encoding.encode_ordinary(text)]).astype(np.uint16)


def sparse_dataset(folder: Path, shards: int) -> Path:
    """A dataset of `shards` times 100M tokens, all zeros, in sparse files: they take no room on the disk."""
    folder.mkdir()
    records = [{"file": f"train-{index:05d}.npy", "tokens": SHARD_TOKENS} for index in range(shards)]
    for record in records:
        np.lib.format.open_memmap(folder / record["file"], mode="w+", dtype="<u2", shape=(SHARD_TOKENS,))
    splits = {"train": {"tokens": shards * SHARD_TOKENS, "shards": records}, "val": {"tokens": 0, "shards": []}}
    info = {"format_version": 1, "tokenizer_sha256": "", "vocab_size": 50257, "eot_id": 50256, "splits": splits}
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


def open_batches(folder: Path, step: int) -> Iterator:
    """The micro-batches of 16 x 1024 tokens from a step on."""
    stream = open_dataset(folder).split("train")
    order = WindowOrder(stream.tokens, 1024, seed=1337)
    return TrainLoader(stream, order, sequences_per_step=512, micro_batch_size=16, vocab_size=50257).batches(step)


def loading(folder: Path) -> Iterator[tuple[str, dict]]:
    """For each size of a dataset: milliseconds from opening to the first batch of some steps, then the rate."""
    for name, shards in ("0.1B tokens", 1), ("10B tokens", 100):
        dataset, first_batch_ms = sparse_dataset(folder / name, shards), []
        for step in 19_072, 0, 777, 10**6, 10**9:
            began = time.perf_counter()
            next(open_batches(dataset, step))
            first_batch_ms.append(1000 * (time.perf_counter() - began))
        batches = open_batches(dataset, 0)
        for seconds in 2, 5:  # the first 2 seconds fill the page cache
            tokens, began = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - began) < seconds:
                tokens += next(batches)["input_ids"].numel()
        yield name, {"tokens_per_s": tokens / elapsed, "first_batch_ms": max(first_batch_ms)}


def measure(arguments: argparse.Namespace, folder: Path) -> dict:
    """Every row of the table by its name."""
    rows = {}
    measured = tokenisation(arguments.corpus, arguments.tokenizer, folder) if arguments.corpus else loading(folder)
    for name, row in measured:
        rows[name] = row
        print_row(name, *(f"   {value:,.1f} {unit}" for unit, value in row.items()))
    return {"benchmark": "data_throughput", "rows": rows}


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--corpus", help="a file of documents (.jsonl, .jsonl.gz, .jsonl.zst or .parquet)")
    parser.add_argument("--tokenizer", default="gpt2", help="a folder or a Hub id (default: gpt2)")
    arguments = parser.parse_args(argv)
    with TemporaryDirectory() as folder:
        return command.run(lambda: finish(arguments, measure(arguments, Path(folder))))


if __name__ == "__main__":
    sys.exit(main())
