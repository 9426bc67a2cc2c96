"""How fast text becomes tokens and tokens become batches; beside build-nanogpt's way of tokenising.

    python -m benchmarks.data_throughput --corpus 'corpus/train-00.jsonl.zst' --tokenizer gpt2 [--json F]
    python -m benchmarks.data_throughput --only loading                        # needs no corpus

Tokenising: every document of the corpus once, `prepare` from end to end (reading, checks, shards, hashes) with 1 and 2
workers, with and without --fast, the start of workers and tokenizer taken off (measured on one document); the
encoders alone on one core; and build-nanogpt's way: a pool of processes, tiktoken, a document a task.
Loading, on one core: random windows of 1,024 tokens from a warm page cache, the time from opening a 10B-token dataset
(sparse files) to the first batch of any step, and the memory of reading from 0.1B and 10B tokens.
--only X runs one part; ways whose packages (tiktoken, gigatoken) are missing are left out and said so.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch

from gpt2repro.data.encoding import exact_encoder, fast_encoder
from gpt2repro.data.loader import TrainLoader
from gpt2repro.data.order import WindowOrder
from gpt2repro.data.prepare import prepare
from gpt2repro.data.shards import HEADER_BYTES, file_sha256, load_tokenizer, open_dataset, shard_header, token_dtype
from gpt2repro.data.sources import open_source

SEQ_LEN, MICRO_BATCH_SIZE, SEQUENCES_PER_STEP = 1024, 16, 512
SHARD_TOKENS = 100_000_000


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# ---------------------------------------------------------------------------------------------------- tokenising


def cpu_seconds() -> float:
    """Of this process and of the workers that it has had: the figure to believe on a machine that others use."""
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def time_prepare(documents: Path, tokenizer: str, out: Path, workers: int, fast: bool) -> tuple[float, float]:
    """Wall and CPU seconds of one preparation."""
    began, cpu = time.perf_counter(), cpu_seconds()
    options = {"tokenizer": tokenizer, "out": out, "val_tokens": 0, "workers": workers, "fast": fast}
    prepare(source="files", files=[str(documents)], **options)
    return time.perf_counter() - began, cpu_seconds() - cpu


def prepared(corpus: Path, tokenizer: str, folder: Path) -> Iterator[dict]:
    """prepare, end to end, in a fresh process; what one document takes (start of workers, tokenizer) is taken off."""
    one = folder / "one.jsonl"
    text = bytes(next(open_source("files", files=[str(corpus)]).documents()).text).decode()
    one.write_text(json.dumps({"text": text}) + "\n", "utf-8")
    hashes = set()
    for workers, fast in (1, False), (1, True), (2, False), (2, True):
        if fast and not has("gigatoken"):
            continue
        out = folder / f"{workers}-{fast}"
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            fresh.submit(time_prepare, one, tokenizer, out / "imports", workers, fast).result()
            start, start_cpu = fresh.submit(time_prepare, one, tokenizer, out / "start", workers, fast).result()
            seconds, cpu = fresh.submit(time_prepare, corpus, tokenizer, out / "corpus", workers, fast).result()
        hashes.add(file_sha256(out / "corpus" / "dataset.json"))
        tokens = open_dataset(out / "corpus").split("train").tokens
        yield {
            "what": f"prepare{' --fast' if fast else ''}, {workers} worker{'s' * (workers > 1)}",
            "tokens": tokens,
            "seconds": round(seconds, 2),
            "start_seconds": round(start, 2),
            "cpu_seconds": round(cpu - start_cpu, 2),
            "tokens_per_s": tokens / (seconds - start),
            "same_shards": len(hashes) == 1,
        }


def encoders_alone(tokenizer_file: Path, texts: list[str]) -> Iterator[dict]:
    """Each encoder on one core, cold, every document once; and whether every id is the same."""
    reference: list[np.ndarray] = []
    for name, make, there in (
        ("tokenizers alone, 1 core", exact_encoder, True),
        ("gigatoken alone, 1 core, cold", fast_encoder, has("gigatoken")),
    ):
        if not there:
            yield {"what": name, "left_out": "the package is not installed"}
            continue
        encode: Callable[[str], np.ndarray] = make(tokenizer_file)
        began = time.perf_counter()
        ids = [encode(text) for text in texts]
        seconds, tokens = time.perf_counter() - began, sum(map(len, ids))
        reference = reference or ids
        equal = all(np.array_equal(a, b) for a, b in zip(reference, ids, strict=True))
        yield {"what": name, "tokens": tokens, "seconds": round(seconds, 2), "tokens_per_s": tokens / seconds,
               "ids_equal": equal}  # fmt: skip


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary: itself, if visible, or one past 255."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


def tiktoken_encoding(tokenizer_file: str):
    """GPT-2's encoding in tiktoken, made of the same tokenizer.json (its own comes over the network)."""
    import tiktoken

    content, table = json.loads(Path(tokenizer_file).read_text("utf-8")), byte_alphabet()
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    ranks = {
        bytes(table[c] for c in entry): i for entry, i in content["model"]["vocab"].items() if entry not in special
    }
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    return tiktoken.Encoding("gpt2-local", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def start_tiktoken(tokenizer_file: str) -> None:
    global _encoding
    _encoding = tiktoken_encoding(tokenizer_file)


def tiktoken_document(text: str) -> np.ndarray:
    return np.array([_encoding.eot_token, *_encoding.encode_ordinary(text)]).astype(np.uint16)


def build_nanogpt_way(tokenizer_file: Path, texts: list[str], folder: Path) -> Iterator[dict]:
    """A pool over documents (imap, chunks of 16), tiktoken in each, shards filled by the main process and np.save."""
    if not has("tiktoken"):
        yield {"what": "build-nanogpt's way", "left_out": "tiktoken is not installed"}
        return
    for processes in 1, 2:
        with multiprocessing.Pool(processes, start_tiktoken, (str(tokenizer_file),)) as pool:
            pool.map(tiktoken_document, ["warm"] * processes)
            began, shard, filled = time.perf_counter(), np.empty(SHARD_TOKENS, np.uint16), 0
            for ids in pool.imap(tiktoken_document, texts, chunksize=16):
                shard[filled : filled + len(ids)] = ids
                filled += len(ids)
            np.save(folder / "build_nanogpt.npy", shard[:filled])
            seconds = time.perf_counter() - began
        name = f"build-nanogpt's way, {processes} process{'es' * (processes > 1)}"
        yield {"what": name, "tokens": filled, "seconds": round(seconds, 2), "tokens_per_s": filled / seconds}


def tokenising(corpus: Path, tokenizer: str) -> list[dict]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load_tokenizer(tokenizer).save_pretrained(folder)
        texts = [
            bytes(d.text).decode() for d in open_source("files", files=[str(corpus)]).documents() if not d.skipped
        ]
        rows = list(encoders_alone(folder / "tokenizer.json", texts))
        rows += build_nanogpt_way(folder / "tokenizer.json", texts, folder)
        del texts
        return rows + list(prepared(corpus, tokenizer, folder))


# ---------------------------------------------------------------------------------------------------- loading


def sparse_dataset(folder: Path, shards: int) -> Path:
    """A dataset of `shards` times 100M tokens, all zeros, that takes no room on the disk."""
    dtype = token_dtype(50257)
    (folder).mkdir()
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
    """In a fresh process on one core: the rate of random windows, and the memory that it added."""
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
    """In a fresh process: milliseconds from opening the folder to the first batch, for each step."""
    took = []
    for step in steps:
        began = time.perf_counter()
        batches = loader_of(folder).batches(step)
        next(batches)
        took.append(1000 * (time.perf_counter() - began))
        batches.close()
    return {"first_ms": took[0], "median_ms": float(np.median(took)), "worst_ms": max(took)}


def loading() -> list[dict]:
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(1) as small, ProcessPoolExecutor(1) as large, \
            ProcessPoolExecutor(1) as third:  # fmt: skip
        one, hundred = sparse_dataset(Path(name) / "one", 1), sparse_dataset(Path(name) / "hundred", 100)
        warm = open_dataset(one).split("train")
        for start in range(0, warm.tokens, 10**7):
            warm.read(start, 10**7)
        steps = [19_072, 0, 1, 777, 12_345, 10**6, 10**9]
        return [
            {"what": "random windows, 0.1B tokens, 1 core", **small.submit(read_batches, one, 5.0).result()},
            {"what": "random windows, 10B tokens, 1 core", **large.submit(read_batches, hundred, 5.0).result()},
            {"what": "open 10B tokens, first batch of a step", **third.submit(first_batches, hundred, steps).result()},
        ]


def show(row: dict) -> str:
    if "left_out" in row:
        return f"{row['what']:42} left out: {row['left_out']}"
    rest = ", ".join(
        f"{key} {value:,.1f}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if key not in ("what", "tokens", "tokens_per_s")
    )
    rate = f"{row['tokens_per_s'] / 1e6:8.2f} M tokens/s" if "tokens_per_s" in row else " " * 19
    return f"{row['what']:42} {rate}   {rest}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_throughput", description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="a file of documents: .jsonl, .jsonl.gz, .jsonl.zst or .parquet")
    parser.add_argument("--tokenizer", default="gpt2", help="a folder or a Hub id (default: gpt2)")
    parser.add_argument("--only", choices=["tokenising", "loading"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.only != "loading" and options.corpus is None:
        parser.error("tokenising needs --corpus FILE")
    rows = [] if options.only == "loading" else tokenising(options.corpus, options.tokenizer)
    rows += [] if options.only == "tokenising" else loading()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version(), "commit": commit,
               "torch": torch.__version__, "numpy": np.__version__}  # fmt: skip
    print("\n".join(map(show, rows)), *[f"{key}: {value}" for key, value in machine.items()], sep="\n")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
