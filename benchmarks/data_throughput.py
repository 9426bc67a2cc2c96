"""How fast text becomes tokens and tokens become batches; beside build-nanogpt's way of tokenising.

    python -m benchmarks.data_throughput --corpus 'corpus/train-00.jsonl.zst' --tokenizer gpt2 [--json F]
    python -m benchmarks.data_throughput                                       # loading alone

Tokenising: every document of the corpus once, `prepare` from end to end (reading, checks, shards, hashes) with 1 and 2
workers, with and without --fast, the start of workers and tokenizer taken off (measured on one document); the
encoders alone on one core; and build-nanogpt's way: a pool of processes, tiktoken, a document a task.
Loading, on one core: random windows of 1,024 tokens from a warm page cache, the time from opening a 10B-token dataset
(sparse files) to the first batch of any step, and the memory of reading from 0.1B and 10B tokens.
Tokenising needs the packages gigatoken and tiktoken.
"""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.measuring import command_line, finish, machine, print_row
from gpt2repro.data.encoding import exact_encoder, fast_encoder
from gpt2repro.data.loader import TrainLoader
from gpt2repro.data.order import WindowOrder
from gpt2repro.data.prepare import prepare
from gpt2repro.data.shards import HEADER_BYTES, file_sha256, load_tokenizer, open_dataset, shard_header, token_dtype
from gpt2repro.data.sources import open_source

SEQ_LEN, MICRO_BATCH_SIZE, SEQUENCES_PER_STEP = 1024, 16, 512
SHARD_TOKENS = 100_000_000


def in_fresh_process(function, *arguments):
    """Nothing imported, cached or pinned to a core in one measurement is there in the next."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def rate(what: str, tokens: int, seconds: float) -> dict:
    return {"what": what, "tokens": tokens, "seconds": round(seconds, 2), "tokens_per_s": tokens / seconds}


# ---------------------------------------------------------------------------------------------------- tokenising


def time_prepare(inputs: dict[str, Path], out: Path, options: dict) -> dict[str, tuple[float, float]]:
    """Seconds of preparing every input, of the clock and of all processors: this process's and its workers'."""
    took = {}
    for name, documents in inputs.items():
        began, cpu = time.perf_counter(), sum(os.times()[:4])
        prepare(source="files", files=[str(documents)], out=out / name, val_tokens=0, **options)
        took[name] = time.perf_counter() - began, sum(os.times()[:4]) - cpu
    return took


def prepared(corpus: Path, tokenizer: str, folder: Path) -> Iterator[dict]:
    """prepare, end to end, in a fresh process; what one document takes (start of workers, tokenizer) is taken off."""
    one = folder / "one.jsonl"
    text = bytes(next(open_source("files", files=[str(corpus)]).documents()).text).decode()
    one.write_text(json.dumps({"text": text}) + "\n", "utf-8")
    hashes = set()
    for workers, fast in (1, False), (1, True), (2, False), (2, True):
        out, options = folder / f"{workers}-{fast}", {"tokenizer": tokenizer, "workers": workers, "fast": fast}
        inputs = {"imports": one, "start": one, "corpus": corpus}
        took = in_fresh_process(time_prepare, inputs, out, options)
        hashes.add(file_sha256(out / "corpus" / "dataset.json"))
        tokens = open_dataset(out / "corpus").split("train").tokens
        (start, start_cpu), (seconds, cpu) = took["start"], took["corpus"]
        yield {
            **rate(f"prepare{' --fast' if fast else ''}, {workers} worker{'s' * (workers > 1)}", tokens, seconds),
            "start_seconds": round(start, 2),
            "cpu_seconds": round(cpu - start_cpu, 2),
            "tokens_per_s": tokens / (seconds - start),
            "same_shards": len(hashes) == 1,
        }


def encoders_alone(tokenizer_file: Path, texts: list[str]) -> Iterator[dict]:
    """Each encoder on one core, cold, every document once; and whether every id is the same."""
    ways = {"tokenizers alone, 1 core": exact_encoder, "gigatoken alone, 1 core, cold": fast_encoder}
    reference: list[np.ndarray] = []
    for name, make in ways.items():
        encode = make(tokenizer_file)
        began = time.perf_counter()
        ids = [encode(text) for text in texts]
        seconds, reference = time.perf_counter() - began, reference or ids
        equal = all(np.array_equal(a, b) for a, b in zip(reference, ids, strict=True))
        yield {**rate(name, sum(map(len, ids)), seconds), "ids_equal": equal}


def start_tiktoken(tokenizer_file: Path) -> None:
    """GPT-2's encoding in tiktoken, made of the same tokenizer.json (its own comes over the network)."""
    global _encoding
    import tiktoken
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    content = json.loads(tokenizer_file.read_text("utf-8"))
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    vocab = {entry: rank for entry, rank in content["model"]["vocab"].items() if entry not in special}
    ranks = {bytes(byte_of[character] for character in entry): rank for entry, rank in vocab.items()}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    _encoding = tiktoken.Encoding("gpt2-local", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def tiktoken_document(text: str) -> np.ndarray:
    return np.array([_encoding.eot_token, *_encoding.encode_ordinary(text)]).astype(np.uint16)


def build_nanogpt_way(tokenizer_file: Path, texts: list[str], folder: Path) -> Iterator[dict]:
    """A pool over documents (imap, chunks of 16), tiktoken in each, shards filled by the main process and np.save."""
    for processes in 1, 2:
        with multiprocessing.Pool(processes, start_tiktoken, (tokenizer_file,)) as pool:
            pool.map(tiktoken_document, ["warm"] * processes)
            began, shard, filled = time.perf_counter(), np.empty(SHARD_TOKENS, np.uint16), 0
            for ids in pool.imap(tiktoken_document, texts, chunksize=16):
                shard[filled : filled + len(ids)] = ids
                filled += len(ids)
            np.save(folder / "build_nanogpt.npy", shard[:filled])
            seconds = time.perf_counter() - began
        yield rate(f"build-nanogpt's way, {processes} process{'es' * (processes > 1)}", filled, seconds)


def tokenising(corpus: Path, tokenizer: str) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load_tokenizer(tokenizer).save_pretrained(folder)
        documents = open_source("files", files=[str(corpus)]).documents()
        texts = [bytes(document.text).decode() for document in documents if not document.skipped]
        yield from encoders_alone(folder / "tokenizer.json", texts)
        yield from build_nanogpt_way(folder / "tokenizer.json", texts, folder)
        del texts
        yield from prepared(corpus, tokenizer, folder)


# ---------------------------------------------------------------------------------------------------- loading


def sparse_dataset(folder: Path, shards: int) -> Path:
    """A dataset of `shards` times 100M tokens, all zeros, that takes no room on the disk."""
    dtype = token_dtype(50257)
    folder.mkdir()
    records = []
    for index in range(shards):
        path = folder / f"train-{index:05d}.npy"
        with open(path, "wb") as file:
            file.write(shard_header(dtype, SHARD_TOKENS))
            file.truncate(HEADER_BYTES + SHARD_TOKENS * dtype.itemsize)
        records.append({"file": path.name, "tokens": SHARD_TOKENS})
    splits = {"train": {"tokens": shards * SHARD_TOKENS, "shards": records}, "val": {"tokens": 0, "shards": []}}
    info = {"format_version": 1, "tokenizer_sha256": "", "vocab_size": 50257, "eot_id": 50256, "splits": splits}
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


def loader_of(folder: Path) -> TrainLoader:
    stream = open_dataset(folder).split("train")
    order = WindowOrder(stream.tokens, SEQ_LEN, seed=1337)
    return TrainLoader(stream, order, sequences_per_step=SEQUENCES_PER_STEP, micro_batch_size=MICRO_BATCH_SIZE,
                       vocab_size=50257)  # fmt: skip


def read_batches(folder: Path, seconds: float) -> dict:
    """On one core: the rate of random windows, and the memory that it added."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    batches = loader_of(folder).batches(0)
    next(batches)
    before, tokens, began = psutil.Process().memory_info().rss, 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        tokens += next(batches)[0].numel()
    added = psutil.Process().memory_info().rss - before
    batches.close()
    return {"tokens_per_s": tokens / elapsed, "tokens": tokens, "memory_added_mb": round(added / 1e6, 1)}


def first_batches(folder: Path, steps: list[int]) -> dict:
    """Milliseconds from opening the folder to the first batch, over some steps."""
    took = []
    for step in steps:
        began = time.perf_counter()
        batches = loader_of(folder).batches(step)
        next(batches)
        took.append(1000 * (time.perf_counter() - began))
        batches.close()
    return {"first_ms": took[0], "median_ms": float(np.median(took)), "worst_ms": max(took)}


def loading() -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as name:
        one, hundred = sparse_dataset(Path(name) / "one", 1), sparse_dataset(Path(name) / "hundred", 100)
        warm = open_dataset(one).split("train")
        for start in range(0, warm.tokens, 10**7):
            warm.read(start, 10**7)
        for size, folder in ("0.1B", one), ("10B", hundred):
            yield {"what": f"random windows, {size} tokens, 1 core", **in_fresh_process(read_batches, folder, 5.0)}
        steps = [19_072, 0, 1, 777, 12_345, 10**6, 10**9]
        yield {"what": "open 10B tokens, first batch of a step", **in_fresh_process(first_batches, hundred, steps)}


def show(row: dict) -> None:
    figures = {key: value for key, value in row.items() if key not in ("what", "tokens", "tokens_per_s")}
    texts = [f"{key} {value:,.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()]
    speed = f"{row['tokens_per_s'] / 1e6:.2f}" if "tokens_per_s" in row else ""
    print_row(row["what"], speed, "  " + ", ".join(texts))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--corpus", type=Path, help="a file of documents: .jsonl, .jsonl.gz, .jsonl.zst or .parquet")
    parser.add_argument("--tokenizer", default="gpt2", help="a folder or a Hub id (default: gpt2)")
    options = parser.parse_args()
    missing = [package for package in ("gigatoken", "tiktoken") if not find_spec(package)]
    if options.corpus and missing:
        parser.error(f"tokenising is compared with {' and '.join(missing)}: pip install {' '.join(missing)}")
    rows = []
    print_row("what", "M tokens/s")
    for row in chain(tokenising(options.corpus, options.tokenizer) if options.corpus else (), loading()):
        show(row)
        rows.append(row)
    finish({"machine": machine(), "rows": rows}, options.json)


if __name__ == "__main__":
    main()
