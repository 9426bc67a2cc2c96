"""All speed measurements of this machine in one command: checks first, then every benchmark, within a time limit.

    make bench                                     # or: python -m benchmarks.gpu_suite --output DIR [--minutes 9.5]
    python -m benchmarks.gpu_suite --output DIR --tiny            # the same at a tiny size: tests the suite itself
    python -m benchmarks.gpu_suite --output DIR --only optimizers --dataset DATA --minutes 15

Needs torch, transformers, accelerate and pytest, and no network. Every part is a process of its own with a time
limit; if one fails or takes too long, the others still run. At most three files are written: suite.json (every part:
seconds, how it ended, its figures; commit, hardware, versions), suite.log (all output), and training.jsonl.

With --dataset a short real training run is one of the parts, with --hellaswag and --tokenizer the scoring of items.
--only names the parts to run. The part `optimizers` runs only if it is named: AdamW against the Muon pack at 124M
(benchmarks/experiments_gpu.sh), with a picture of its own in DIR/optimizers; the same command again resumes it. The
exit code is 1 if the first part failed: the checks.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.measuring import ROOT, machine
from gpt2repro import command
from gpt2repro.files import write_whole

PART_MINUTES = 3.5  # the most for one part
STEPS = "-m benchmarks.train_throughput --memory --batch-size 64 --seq-len 1024 --variants"
# What Python, or bash for a script, runs for every part; the most important first, because time may run out. A word in
# braces is an option.
PARTS = {
    "checks": "-m pytest -q tests/benchmarks/test_step.py",
    "throughput": f"{STEPS} ours ours-chunked stock",
    "ladder": "-m benchmarks.ladder --batch-size 16 --seq-len 1024",
    "generation": "-m benchmarks.generation --rounds 2",
    "training": "-m train_accelerate --dataset_dir {dataset} --output_dir {run_dir} --model gpt2 --seq_len 1024 "
    "--micro_batch_size 64 --global_batch_tokens 524288 --max_steps 30 --warmup_steps 10 --eval_every 15 "
    "--eval_tokens 262144 --save_every 15 --sample_every 0 --profile_steps 2",
    "hellaswag": "-m benchmarks.eval_throughput --data {hellaswag} --tokenizer {tokenizer} --items 2000 --rounds 1 "
    "--dtype bfloat16",
    "roofline": "-m benchmarks.roofline --variant ours-chunked --batch-size 64 --seq-len 1024",
    "kernels": f"{STEPS} ours-chunked ours-flash ours-cudnn ours-max-autotune",
    "eager": f"{STEPS} ours-chunked stock-eager --rounds 3",  # may not fit in memory
    "optimizers": "benchmarks/experiments_gpu.sh {dataset} {output}/optimizers",
}
# Options that --tiny adds; they replace those before them.
TINY_STEP = "--model-shape demo --batch-size 2 --seq-len 64 --rounds 2"
TINY = {
    "throughput": TINY_STEP,
    "ladder": TINY_STEP,
    "generation": "--model-shape demo --batch-sizes 1 2 --new-tokens 8",
    "training": "--model demo --seq_len 64 --micro_batch_size 2 --global_batch_tokens 256 --max_steps 8 "
    "--warmup_steps 2 --eval_every 4 --eval_tokens 512 --save_every 4",
    "hellaswag": "--items 8",
    "roofline": TINY_STEP,
    "kernels": TINY_STEP,
    "eager": TINY_STEP,
    "optimizers": "2 --model demo --seq_len 64 --global_batch_tokens 256 --micro_batch_size 2 --eval_tokens 512",
}


def run_part(name: str, words: list[str], log_path: Path, *, seconds: float) -> dict:
    """Run one part for at most `seconds`; how it ended, and its figures: JSON on the last line that it printed."""
    began = time.perf_counter()
    with log_path.open("a+", encoding="utf-8") as log:
        print(f"\n==== {name}", file=log, flush=True)
        start = log.seek(0, os.SEEK_END)
        words = [sys.executable if words[0].startswith("-") else "bash", *words]
        environment = {**os.environ, "PYTHON": sys.executable}  # for a script
        with subprocess.Popen(
            words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        ) as process:
            try:
                code = process.wait(seconds)
                ended = "done" if code == 0 else f"exit code {code}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
                ended = "cut off"
        log.seek(start)
        lines = [line for line in log.read().splitlines() if line.startswith("{")]
    figures = json.loads(lines[-1]) if ended == "done" and lines else None
    return {"part": name, "seconds": round(time.perf_counter() - began, 1), "ended": ended, "figures": figures}


def run_suite(arguments: argparse.Namespace) -> int:
    out, deadline = Path(arguments.output), time.perf_counter() + 60 * arguments.minutes
    out.mkdir(parents=True, exist_ok=True)
    log_path, run_dir, cuda = out / "suite.log", out / ".run", torch.cuda.is_available()
    log_path.write_text("", encoding="utf-8")
    figures: dict = {"benchmark": "gpu_suite", "machine": machine("cuda" if cuda else "cpu"), "parts": []}
    possible = {"training": arguments.dataset, "hellaswag": arguments.hellaswag, "kernels": cuda}
    possible["optimizers"] = arguments.only and arguments.dataset
    for name, line in PARTS.items():
        left = deadline - time.perf_counter()
        if arguments.only and name not in arguments.only:
            continue
        if left < 5 or not possible.get(name, True):
            needs = "needs --dataset, --hellaswag, --only or CUDA"
            print(f"{name:12} left out: {'no time left' if left < 5 else needs}")
            continue
        line += f" {TINY.get(name, '')}" if arguments.tiny else ""
        words = [word.format(**vars(arguments), run_dir=run_dir) for word in line.split()]
        whole = arguments.tiny or name == "optimizers"
        part = run_part(name, words, log_path, seconds=left if whole else min(left, 60 * PART_MINUTES))
        print(f"{name:12} {part['seconds']:6.1f} s  {part['ended']}", flush=True)
        figures["parts"].append(part)
        write_whole(out / "suite.json", json.dumps(figures, indent=1) + "\n")  # now: the machine may go away
        if (run_dir / "metrics.jsonl").exists():
            shutil.copy(run_dir / "metrics.jsonl", out / "training.jsonl")
    shutil.rmtree(run_dir, ignore_errors=True)
    if not figures["parts"]:
        raise ValueError("no part was run: give what they need, or more --minutes")
    return command.DONE if figures["parts"][0]["ended"] == "done" else command.EXPLAINED


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: tests the suite, measures nothing")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="run these parts alone")
    parser.add_argument("--dataset", help="prepared dataset for a short real run")
    parser.add_argument("--hellaswag", help="HellaSwag items as JSONL, to time the scorer")
    parser.add_argument("--tokenizer", default="gpt2", help="folder with GPT-2's tokenizer, for --hellaswag")
    arguments = parser.parse_args(argv)
    return command.run(lambda: run_suite(arguments))


if __name__ == "__main__":
    sys.exit(main())
