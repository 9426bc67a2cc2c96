"""Everything about speed on this machine in one command: checks first, then every benchmark, within a time budget.

    make bench                                     # or: python -m benchmarks.gpu_suite --output DIR [--minutes 9.5]
    python -m benchmarks.gpu_suite --output DIR --tiny            # the same at a tiny size, to try the suite itself

Needs torch, transformers, accelerate and pytest, and no network. Every part runs in a process of its own with its
share of the time; one that fails or is cut off is reported and the rest goes on. At most four files are written:

    suite.json       every part: how long, how it ended, its figures; commit, hardware, versions
    suite.log        all that the parts printed
    ladder.png, training.jsonl

A prepared dataset (--dataset) makes a short real training run one of the parts; HellaSwag items (--hellaswag, with
--tokenizer) are timed. Exit code 1 if a check failed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.training_step import machine
from eval.loading import run_command, write_json

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Part:
    """A command and the most minutes it may take; the last line it prints is JSON where it has figures."""

    name: str
    command: list[str]
    minutes: float


def parts(arguments: argparse.Namespace, out: Path) -> list[Part]:
    """What runs, in the order of what would be missed most if time ran out."""
    tiny, cuda = arguments.tiny, torch.cuda.is_available()
    device = ["--device", "cuda" if cuda else "cpu"]
    shape = ["--model-shape", "demo" if tiny else "gpt2", *device]
    full = ["--batch-size", "2" if tiny else "64", "--seq-len", "64" if tiny else "1024", *shape]
    quarter = ["--batch-size", "2" if tiny else "16", "--seq-len", "64" if tiny else "1024", *shape]
    few, many = ["--rounds", "2"], ["--rounds", "2" if tiny else "10"]
    decode = ["--batch-sizes", "1", "2", "--new-tokens", "8"] if tiny else []

    def module(name: str, *words: str) -> list[str]:
        return [sys.executable, "-m", f"benchmarks.{name}", *words]

    def throughput(*words: str) -> list[str]:
        return module("train_throughput", "--memory", *words)

    found = [
        Part("checks", [sys.executable, "-m", "pytest", "-q", "tests/benchmarks/test_step.py"], 2),
        Part("throughput", throughput(*full, *many, "--variants", "ours", "ours-chunked", "stock", "stock-eager"), 3),
        Part("ladder", module("ladder", *quarter, *many, "--png", str(out / "ladder.png")), 3),
        Part("recompute", throughput(*full, *few, "--variants", "ours-recompute"), 1),
        Part("memory-16", throughput(*quarter, *few, "--variants", "ours-chunked"), 1),
        Part("generation", module("generation", *shape, *few, *decode), 2.5),
    ]
    if arguments.dataset:
        found.append(Part("training", training_run(arguments, out), 2))
    if arguments.hellaswag:
        words = ["--data", arguments.hellaswag, "--tokenizer", arguments.tokenizer or "gpt2", *device, "--rounds", "1"]
        words += ["--dtype", "bfloat16", "--items", "8" if tiny else "2000", "--lm-eval-batch-sizes"]
        found.append(Part("hellaswag", module("eval_throughput", *words), 1.5))
    if cuda:
        modes = ["ours-chunked", "ours-flash", "ours-cudnn", "ours-max-autotune"]
        found.append(Part("modes", throughput(*full, *many, "--variants", *modes), 4))
    return found


def training_run(arguments: argparse.Namespace, out: Path) -> list[str]:
    """A short real run on prepared shards, profiled; `main` keeps its metrics as training.jsonl."""
    run_dir = out / ".run"
    sizes = (64, 2, 8, 256, 2, 4) if arguments.tiny else (1024, 64, 30, 524288, 10, 15)
    seq_len, micro_batch_size, max_steps, global_batch_tokens, warmup_steps, every = sizes
    fields = {
        "output_dir": run_dir, "dataset_dir": arguments.dataset, "model": "demo" if arguments.tiny else "gpt2",
        "seq_len": seq_len, "micro_batch_size": micro_batch_size, "max_steps": max_steps,
        "global_batch_tokens": global_batch_tokens, "warmup_steps": warmup_steps, "eval_every": every,
        "eval_tokens": 4 * micro_batch_size * seq_len, "sample_every": 0, "save_every": every, "profile_steps": 2,
    }  # fmt: skip
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "train_accelerate.py", *words]


def run_part(part: Part, log_path: Path, *, seconds: float) -> dict:
    """Run one part for at most `seconds`; how it ended, and its figures."""
    began = time.perf_counter()
    with log_path.open("a+", encoding="utf-8") as log:
        log.write(f"\n==== {part.name}\n")
        log.flush()
        start = log.seek(0, os.SEEK_END)
        # A session of its own, so that cutting it off takes its compile workers along.
        process = subprocess.Popen(
            part.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            ended = "done" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ended = "cut off"
        log.seek(start)
        lines = [line for line in log.read().splitlines() if line.startswith("{")]
    figures = json.loads(lines[-1]) if ended == "done" and lines else None
    return {"part": part.name, "seconds": round(time.perf_counter() - began, 1), "ended": ended, "figures": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: shows that the suite works, measures nothing")
    parser.add_argument("--dataset", help="prepared dataset for a short real run")
    parser.add_argument("--hellaswag", help="HellaSwag items as JSONL, to time the scorer")
    parser.add_argument("--tokenizer", help="folder with GPT-2's tokenizer, for --hellaswag")
    parser.add_argument("--only", nargs="+", help="names of the parts to run")
    arguments = parser.parse_args()
    out = Path(arguments.output)
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + 60 * arguments.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict = {"benchmark": "gpu_suite", "tiny": arguments.tiny, "machine": machine(device), "parts": []}
    log_path = out / "suite.log"
    log_path.write_text("", encoding="utf-8")
    for part in parts(arguments, out):
        if arguments.only and part.name not in arguments.only:
            continue
        left = deadline - time.perf_counter()
        if left > 5:
            ended = run_part(part, log_path, seconds=left if arguments.tiny else min(left, 60 * part.minutes))
        else:
            ended = {"part": part.name, "seconds": 0.0, "ended": "no time left", "figures": None}
        if (out / ".run").exists():
            if (out / ".run" / "metrics.jsonl").exists():
                shutil.copy(out / ".run" / "metrics.jsonl", out / "training.jsonl")
            shutil.rmtree(out / ".run")
        print(f"{ended['part']:12} {ended['seconds']:6.1f} s  {ended['ended']}", flush=True)
        figures["parts"].append(ended)
        write_json(out / "suite.json", figures)  # after every part: a machine that goes away leaves what it had
    lines = log_path.read_text(encoding="utf-8").splitlines()
    print("\n".join(line[:150] for line in lines if not line.startswith("{"))[-9000:])
    if any(part["part"] == "checks" and part["ended"] != "done" for part in figures["parts"]):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
