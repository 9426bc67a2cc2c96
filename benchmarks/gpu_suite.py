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
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measuring import machine
from eval.loading import run_command, write_json

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Part:
    """What Python runs and the most minutes it may take; the last line it prints is JSON where it has figures."""

    name: str
    minutes: float
    command: str  # what comes after `python`


def parts(arguments: argparse.Namespace, run_dir: Path, png: Path) -> list[Part]:
    """What runs, in the order of what would be missed most if time ran out."""
    cuda, quoted = torch.cuda.is_available(), shlex.quote
    device = "--device cuda" if cuda else "--device cpu"
    if arguments.tiny:
        shape, few, many, decode, items = f"--model-shape demo {device}", 2, 2, "--batch-sizes 1 2 --new-tokens 8", 8
        full = quarter = f"--batch-size 2 --seq-len 64 {shape}"
        fields = "--model demo --seq_len 64 --micro_batch_size 2 --global_batch_tokens 256 --eval_tokens 512"
        steps = "--max_steps 8 --warmup_steps 2 --eval_every 4 --save_every 4"
    else:
        shape, few, many, decode, items = f"--model-shape gpt2 {device}", 2, 10, "", 2000
        full, quarter = (f"--batch-size {size} --seq-len 1024 {shape}" for size in (64, 16))
        fields = "--model gpt2 --seq_len 1024 --micro_batch_size 64 --global_batch_tokens 524288 --eval_tokens 262144"
        steps = "--max_steps 30 --warmup_steps 10 --eval_every 15 --save_every 15"
    throughput = "-m benchmarks.train_throughput --memory"
    modes = "ours-chunked ours-flash ours-cudnn ours-max-autotune"
    found = [
        Part("checks", 2, "-m pytest -q tests/benchmarks/test_step.py"),
        Part("throughput", 3, f"{throughput} {full} --rounds {many} --variants ours ours-chunked stock stock-eager"),
        Part("ladder", 3, f"-m benchmarks.ladder {quarter} --rounds {many} --png {quoted(str(png))}"),
        Part("recompute", 1, f"{throughput} {full} --rounds {few} --variants ours-recompute"),
        Part("memory-16", 1, f"{throughput} {quarter} --rounds {few} --variants ours-chunked"),
        Part("generation", 2.5, f"-m benchmarks.generation {shape} --rounds {few} {decode}"),
    ]
    if arguments.dataset:
        folders = f"--dataset_dir {quoted(arguments.dataset)} --output_dir {quoted(str(run_dir))}"
        rest = "--sample_every 0 --profile_steps 2"
        found.append(Part("training", 2, f"-m train_accelerate {folders} {fields} {steps} {rest}"))
    if arguments.hellaswag:
        data = f"--data {quoted(arguments.hellaswag)} --tokenizer {quoted(arguments.tokenizer)} --items {items}"
        settings = f"{device} --rounds 1 --dtype bfloat16 --lm-eval-batch-sizes"
        found.append(Part("hellaswag", 1.5, f"-m benchmarks.eval_throughput {data} {settings}"))
    if cuda:
        found.append(Part("modes", 4, f"{throughput} {full} --rounds {many} --variants {modes}"))
    return found


def run_part(part: Part, log_path: Path, *, seconds: float) -> dict:
    """Run one part for at most `seconds`; how it ended, and its figures."""
    began = time.perf_counter()
    with log_path.open("a+", encoding="utf-8") as log:
        print(f"\n==== {part.name}", file=log, flush=True)
        start = log.seek(0, os.SEEK_END)
        # A session of its own, so that cutting it off takes its compile workers along.
        command = [sys.executable, *shlex.split(part.command)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
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
    parser.add_argument("--tokenizer", default="gpt2", help="folder with GPT-2's tokenizer, for --hellaswag")
    arguments = parser.parse_args()
    out = Path(arguments.output)
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + 60 * arguments.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict = {"benchmark": "gpu_suite", "tiny": arguments.tiny, "machine": machine(device), "parts": []}
    log_path, run_dir = out / "suite.log", out / ".run"
    log_path.write_text("", encoding="utf-8")
    for part in parts(arguments, run_dir, out / "ladder.png"):
        left = deadline - time.perf_counter()
        if left > 5:
            ended = run_part(part, log_path, seconds=left if arguments.tiny else min(left, 60 * part.minutes))
        else:
            ended = {"part": part.name, "seconds": 0.0, "ended": "no time left", "figures": None}
        if (run_dir / "metrics.jsonl").exists():
            shutil.copy(run_dir / "metrics.jsonl", out / "training.jsonl")
        shutil.rmtree(run_dir, ignore_errors=True)
        print(f"{ended['part']:12} {ended['seconds']:6.1f} s  {ended['ended']}", flush=True)
        figures["parts"].append(ended)
        write_json(out / "suite.json", figures)  # after every part: a machine that goes away leaves what it had
    lines = log_path.read_text(encoding="utf-8").splitlines()
    print("\n".join(line[:150] for line in lines if not line.startswith("{"))[-9000:])
    if any(part["part"] == "checks" and part["ended"] != "done" for part in figures["parts"]):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
