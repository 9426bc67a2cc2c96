"""What a person waits for: answers of a command, imports, starts of a run cold and warm, a save, a resume, a score.

    python -m benchmarks.waiting [--model gpt2] [--tokenizer GPT2_TOKENIZER] [--repeats 3] [--json F.json]

Every wait is that of a whole new process, by the clock. A cold start has an empty compiler's cache, the warm one uses
what the cold one left there; both end when step 1 is in metrics.jsonl. Runs train on Python's own documentation.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks.measuring import ROOT, benchmark_parser, finish, print_row
from configuration_gpt2repro import NAMED_SHAPES
from gpt2repro import command
from gpt2repro.data.prepare import prepare
from gpt2repro.run.folder import RunFolder

SCRIPT = "train_accelerate.py"
ANSWERS = {  # what Python runs, with the exit code
    "--help": ([SCRIPT, "--help"], command.DONE),
    "an unknown field": ([SCRIPT, "--sed", "1"], command.USAGE),
    "a value out of range": ([SCRIPT, "--learning_rate", "-1"], command.EXPLAINED),
    "import torch, transformers": (["-c", "import torch; from transformers import PreTrainedModel"], command.DONE),
    "import modeling_gpt2repro": (["-c", "import modeling_gpt2repro"], command.DONE),
}
STEPS, SAVED = 3, 2  # of a run; the checkpoint that it resumes from


def seconds_of(words: list[str], *, code: int = command.DONE) -> float:
    """Seconds of a process until it ends, which must be with exit code `code`."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode != code:
        raise ValueError(f"{' '.join(words)} ended with {done.returncode}, expected {code}:\n{done.stderr[-2000:]}")
    return seconds


def seconds_to_step(folder: Path, step: int, flags: list[str], cache: Path) -> float:
    """Seconds from a run's start until its row of `step` is written; the run then goes on to its end."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    words = [sys.executable, SCRIPT, "--output_dir", str(folder), *flags]
    began, wall = time.perf_counter(), time.time()
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    metrics, seconds = folder / "metrics.jsonl", None
    while seconds is None and process.poll() is None:
        time.sleep(0.01)
        if metrics.exists() and metrics.stat().st_mtime > wall:  # a resumed run has the row of the start before it
            if any((row["kind"], row["step"]) == ("train", step) for row in RunFolder(folder).rows()):
                seconds = time.perf_counter() - began
    error = process.communicate()[1].decode()
    if seconds is None or process.returncode:
        raise ValueError(f"{' '.join(words)} ended with {process.returncode}:\n{error[-2000:]}")
    return seconds


def waits(arguments: argparse.Namespace, dataset: Path, folder: Path) -> Iterator[tuple[str, float]]:
    """Every wait once: its name and seconds. `folder` is empty."""
    for name, (words, code) in ANSWERS.items():
        yield name, seconds_of(words, code=code)
    recipe = {
        "dataset_dir": dataset, "model": arguments.model, "seq_len": 256, "micro_batch_size": 4,
        "global_batch_tokens": 1024, "max_steps": STEPS, "warmup_steps": 1, "eval_every": 0, "sample_every": 0,
        "save_every": SAVED,
    }  # fmt: skip
    flags = [word for name, value in recipe.items() for word in (f"--{name}", str(value))]
    cache, run = folder / "cache", folder / "run"
    yield "step 1, eager", seconds_to_step(folder / "eager", 1, [*flags, "--compile", "false"], cache)
    flags += ["--compile", "true"]
    yield "step 1, compiled, cold cache", seconds_to_step(folder / "cold", 1, flags, cache)
    yield "step 1, compiled, warm cache", seconds_to_step(run, 1, flags, cache)
    yield "save of a checkpoint", next(row["seconds"] for row in RunFolder(run).rows() if row["kind"] == "checkpoint")
    shutil.rmtree(run / f"step-{STEPS:08}")
    yield f"resume to step {SAVED + 1}, warm cache", seconds_to_step(run, SAVED + 1, flags, cache)
    text = folder / "text.txt"
    text.write_text((ROOT / "README.md").read_text(encoding="utf-8")[:1000], encoding="utf-8")
    scoring = ["-m", "eval.validation", "--model", str(run / "latest"), "--text", str(text)]
    yield "validation of 1,000 characters", seconds_of([*scoring, "--output", str(folder / "val.json")])


def measure(arguments: argparse.Namespace) -> dict:
    """Median, least and most seconds of every wait."""
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="waiting-") as temporary:
        dataset = prepare(source="python-docs", tokenizer=arguments.tokenizer, out=Path(temporary) / "data")
        for repeat in range(arguments.repeats):
            folder = Path(temporary) / str(repeat)
            folder.mkdir()
            for name, took in waits(arguments, dataset, folder):
                seconds.setdefault(name, []).append(took)
                print(f"{took:8.2f} s  {name}", flush=True)
            shutil.rmtree(folder)
    print_row("wait", "seconds", "least", "most")
    for name, times in seconds.items():
        print_row(name, *(f"{each:.2f}" for each in (median(times), min(times), max(times))))
    return {"benchmark": "waiting", "seconds": seconds}


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--model", default="gpt2", choices=list(NAMED_SHAPES), help="shape (default: %(default)s)")
    tokenizer = "its entries are the rows of the head: train:N, a folder or a Hub id (default: %(default)s)"
    parser.add_argument("--tokenizer", default="train:4096", help=tokenizer)
    parser.add_argument("--repeats", type=int, default=3, help="of everything (default: %(default)s)")
    arguments = parser.parse_args(argv)
    return command.run(lambda: finish(arguments, measure(arguments)))


if __name__ == "__main__":
    sys.exit(main())
