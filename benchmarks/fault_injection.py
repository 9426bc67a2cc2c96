"""Fault injection: kill training runs at random moments and compare each with an unbroken run.

    python -m benchmarks.fault_injection --kills 200 --processes 2 [--dataset DIR] [--json F] [--seed S]

A small run that saves every second step is killed with SIGKILL and started again by the same command until it ends;
then the next run, until all kills are done. A tenth of the kills fall in the first seconds of a start (imports,
resume), a third a few milliseconds after a save began, the others in the first second of the training loop. All
processes are killed at once; of two, in a quarter of the kills, only one rank, and the launcher must end the other.
With `--processes 1 2` each start draws its number of processes.

After every kill, each checkpoint is verified against its hashes, the newest complete one must still be there, and the
next start must resume from it. After every run, the last model.safetensors, the last optimizer.safetensors and all
logged losses must be bit for bit those of the unbroken run. The exit code is 1 if anything was lost or differs.
"""

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from benchmarks.measuring import ROOT, benchmark_parser, finish, print_row
from gpt2repro import command
from gpt2repro.data.prepare import prepare
from gpt2repro.files import file_sha256
from gpt2repro.run.checkpoints import OPTIMIZER, RECORD, verify_checkpoint
from gpt2repro.run.folder import RunFolder

KEEP_LAST = 2
FLAGS = (
    "--model demo --n_layer 2 --n_head 2 --n_embd 32 --n_positions 32 --seq_len 32 --global_batch_tokens 256 "
    "--micro_batch_size 4 --warmup_steps 2 --learning_rate 3e-3 --eval_every 50 --eval_tokens 1024 --sample_every 0 "
    f"--save_every 2 --keep_last {KEEP_LAST} --mixed_precision no --compile false"
)
LAUNCHER = "-m accelerate.commands.launch --config_file accelerate_configs/cpu_2proc.yaml --main_process_port 0"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
IN_THE_LOOP = " training tokens; "  # the script prints it when everything is loaded, after "resumed from"
TEARDOWN_SECONDS = 60  # a launcher that lost a rank ends the others within this; it waits 30 s before it kills


@dataclass
class Campaign:
    """The kills of runs of one number of processes (of two numbers each start draws one), and their results."""

    processes: list[int]
    kills: int = 0
    kills_before_the_loop: int = 0
    kills_inside_a_save: int = 0
    kills_of_one_rank: int = 0
    slowest_teardown_seconds: float = 0.0
    runs: int = 0
    checkpoints_seen: int = 0
    lost: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)


class Run:
    """One run in `folder`, started again and again."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.flags = [*FLAGS.split(), *flags, "--output_dir", str(folder)]
        self.seen: set[str] = set()  # every checkpoint that was ever complete

    def start(self, processes: int) -> subprocess.Popen:
        launcher = [*LAUNCHER.split(), "--num_processes", str(processes)] if processes > 1 else []
        words = [sys.executable, *launcher, "train_accelerate.py", *self.flags]
        with self.log.open("w") as log:
            return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=ENVIRONMENT)

    def complete(self) -> list[str]:
        """The names of the complete checkpoints, oldest first."""
        return sorted(path.parent.name for path in self.folder.glob(f"step-*/{RECORD}"))

    def saving(self) -> bool:
        """Whether a save or the deletion of an old checkpoint is under way."""
        return any(self.folder.glob(".step-*.tmp"))

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def in_the_loop(self) -> bool:
        return IN_THE_LOOP in self.output()

    def result(self) -> dict:
        """What must be equal: hashes of the last weights and optimizer state, and every logged loss, once."""
        rows = [row for row in RunFolder(self.folder).rows() if "loss" in row]
        files = {name: file_sha256(self.folder / "latest" / name) for name in ("model.safetensors", OPTIMIZER)}
        losses = {f"{row['kind']} loss of step {row['step']}": row["loss"] for row in rows}
        return {**files, **losses, "number of losses": len(rows)}

    def problems(self) -> Iterator[str]:
        """Complete checkpoints that are gone or damaged."""
        complete, newest = self.complete(), max(self.seen, default="")
        if max(complete, default="") < newest or len(complete) < min(KEEP_LAST, len(self.seen)):
            yield f"{len(self.seen)} checkpoints up to {newest} had been complete, {complete} are there"
        for name in complete:
            try:
                verify_checkpoint(self.folder / name)
            except ValueError as error:
                yield str(error)
        self.seen.update(complete)


def reach_random_moment(run: Run, process: subprocess.Popen) -> bool:
    """Wait for a moment of one of the three kinds; False if the run ended before."""

    def wait(condition: Callable[[], bool]) -> bool:
        while not condition():
            if process.poll() is not None:
                return False
            run.seen.update(run.complete())
            time.sleep(0.001)
        return True

    def pause(seconds: float) -> bool:
        end = time.monotonic() + seconds
        return wait(lambda: time.monotonic() > end)

    kind = random.random()
    if kind < 0.1:
        return pause(random.uniform(0, 8))
    in_the_loop = wait(run.in_the_loop) and pause(random.random())
    if kind < 0.43:
        return in_the_loop and wait(run.saving) and pause(random.uniform(0, 0.015))
    return in_the_loop


def kill(process: subprocess.Popen, campaign: Campaign) -> None:
    """SIGKILL to every process of the run, or to one rank only; returns when all have ended."""
    launcher = psutil.Process(process.pid)
    ranks = launcher.children(recursive=True)
    one_rank = len(ranks) == 2 and random.random() < 0.25
    for victim in [random.choice(ranks)] if one_rank else [*ranks, launcher]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    began = time.monotonic()
    process.wait(timeout=TEARDOWN_SECONDS)
    psutil.wait_procs(ranks, timeout=TEARDOWN_SECONDS)
    campaign.kills += 1
    if one_rank:
        campaign.kills_of_one_rank += 1
        campaign.slowest_teardown_seconds = max(campaign.slowest_teardown_seconds, time.monotonic() - began)


def run_to_the_end(run: Run, campaign: Campaign, kills: int) -> None:
    """Start and kill the run until it ends; after `kills` kills of the campaign no start is killed."""
    ended = False
    while not ended:
        newest = max(run.complete(), default="")
        process = run.start(random.choice(campaign.processes))
        if campaign.kills < kills and reach_random_moment(run, process):
            kill(process, campaign)
            campaign.kills_inside_a_save += run.saving()
            campaign.kills_before_the_loop += not run.in_the_loop()
        elif process.wait():
            raise RuntimeError(f"{run.folder} ended with exit code {process.returncode}:\n{run.output()}")
        ended = process.returncode == 0
        campaign.lost += run.problems()
        if newest and run.in_the_loop() and f"resumed from {(run.folder / newest).resolve()}" not in run.output():
            campaign.lost.append(f"the next start did not resume from {run.folder / newest}")


def inject_faults(arguments: argparse.Namespace, folder: Path) -> int:
    """An unbroken run, then runs that are killed until all kills are done, each compared with it."""
    random.seed(arguments.seed)
    began, campaign = time.monotonic(), Campaign(arguments.processes)
    dataset = arguments.dataset or prepare(source="python-docs", tokenizer="train:512", out=folder / "dataset")
    # Each rank draws its own dropout masks: without dropout runs of different numbers of processes are equal.
    dropout = 0.1 if len(campaign.processes) == 1 else 0.0
    flags = ["--dataset_dir", str(dataset), *f"--max_steps {arguments.max_steps} --dropout {dropout}".split()]
    unbroken = Run(folder / "unbroken", flags)
    run_to_the_end(unbroken, Campaign(campaign.processes[:1]), kills=0)
    assert unbroken.in_the_loop(), f"the script does not print {IN_THE_LOOP!r} any more"
    expected = unbroken.result()
    while campaign.kills < arguments.kills:
        run = Run(folder / f"{campaign.runs:03}", flags)
        run_to_the_end(run, campaign, arguments.kills)
        result = run.result()
        different = [name for name in expected | result if result.get(name) != expected.get(name)]
        campaign.mismatches += [f"{run.folder}: {name}" for name in different]
        campaign.runs += 1
        campaign.checkpoints_seen += len(run.seen)
        print(f"{campaign.kills} of {arguments.kills} kills", file=sys.stderr, flush=True)
        shutil.rmtree(run.folder)
    for name, value in asdict(campaign).items():
        print_row(name.replace("_", " "), str(value))
    figures = {"seconds": time.monotonic() - began, "flags": FLAGS, "campaigns": [asdict(campaign)]}
    finish(arguments, {"benchmark": "fault_injection", **figures})
    return command.EXPLAINED if campaign.lost or campaign.mismatches else command.DONE


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--kills", type=int, default=200, help="over all runs (default: 200)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--max-steps", type=int, default=400, help="of a run (default: 400)")
    parser.add_argument("--dataset", type=Path, help="a prepared dataset (default: Python's documentation)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    arguments = parser.parse_args(argv)
    with TemporaryDirectory() as folder:
        return command.run(lambda: inject_faults(arguments, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
