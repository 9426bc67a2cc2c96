"""Kill a run again and again: what survives, and does it end where the unbroken run ends?

    python -m benchmarks.fault_injection --kills 200 --processes 1 2 [--dataset DIR] [--json F] [--seed S]

A small run that saves every second step is killed with SIGKILL and started again with the same command until it ends;
then the next run, until all kills are spent. A third of the kills wait for the hidden folder of a save and fall a few
milliseconds after it appears, a tenth fall at any moment of the first seconds of a start (imports, resume), the others
in the first second of its loop. All processes are killed at once; of two, in a quarter of the kills, one rank alone,
and the launcher must end the rest. With two counts of processes, a third campaign draws one for every start.

After every kill each checkpoint is read against its hashes, the newest that was ever seen complete must be there (or a
newer one), and the next start must go on from it. After every run the last model.safetensors, optimizer.safetensors
and all logged losses must be those of the unbroken run, bit for bit. Anything lost or different is exit code 1.
"""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from hashlib import file_digest
from pathlib import Path

import psutil

from benchmarks.measuring import command_line, finish, machine, print_row
from eval.loading import run_command
from gpt2repro.data.prepare import prepare
from gpt2repro.run.checkpoints import RECORD, verify_checkpoint
from gpt2repro.run.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
KEEP_LAST = 2
RECIPE = {
    "model": "demo", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "seq_len": 32,
    "global_batch_tokens": 256, "micro_batch_size": 4, "warmup_steps": 2, "learning_rate": 3e-3, "eval_every": 50,
    "eval_tokens": 1024, "sample_every": 0, "save_every": 2, "keep_last": KEEP_LAST, "mixed_precision": "no",
    "compile": "false",
}  # fmt: skip
IN_THE_LOOP = "training tokens, step"  # the script says so when all is loaded
TEARDOWN_SECONDS = 60  # a launcher that has lost a rank ends the others within this; it waits 30 s before it kills


@dataclass
class Campaign:
    """The kills of one number of processes (two numbers: each start draws one), and what came of them."""

    processes: list[int]
    kills: int = 0
    kills_before_the_loop: int = 0
    kills_inside_a_save: int = 0
    kills_of_one_rank: int = 0
    runs: int = 0
    starts: int = 0
    checkpoints_seen: int = 0
    lost: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    slowest_teardown_seconds: float = 0.0

    @property
    def dropout(self) -> float:
        """Each rank draws its own masks, so that runs of different numbers of processes are equal only without."""
        return 0.1 if len(self.processes) == 1 else 0.0


class Run:
    """One run in `folder`, started over and over."""

    def __init__(self, folder: Path, **fields) -> None:
        self.folder = folder
        self.log = folder.with_suffix(".log")
        recipe = {**RECIPE, "output_dir": folder, **fields}
        self.flags = [word for name, value in recipe.items() for word in (f"--{name}", str(value))]
        self.seen: set[str] = set()

    def start(self, processes: int) -> subprocess.Popen:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu_2proc.yaml",
                    "--num_processes", str(processes), "--main_process_port", "0"]  # fmt: skip
        command = [sys.executable, *(launcher if processes > 1 else []), "train_accelerate.py", *self.flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
        with self.log.open("w") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)

    def complete(self) -> list[str]:
        """The names of the complete checkpoints, oldest first."""
        return sorted(path.parent.name for path in self.folder.glob(f"step-*/{RECORD}"))

    def saving(self) -> bool:
        """Whether the hidden folder of a save, or of a checkpoint that is being pruned, is there."""
        return any(self.folder.glob(".step-*.tmp"))

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def fingerprint(self) -> dict[str, str | float]:
        """What must be equal: the bytes of the last weights and optimizer state, and every logged loss, once."""
        found: dict[str, str | float] = {}
        for name in ("model.safetensors", "optimizer.safetensors"):
            with (self.folder / "latest" / name).open("rb") as file:
                found[name] = file_digest(file, "sha256").hexdigest()
        rows = [row for row in read_metrics(self.folder / "metrics.jsonl") if "loss" in row]
        losses = {f"{row['kind']} loss of step {row['step']}": row["loss"] for row in rows}
        return found | losses | {"number of losses": len(rows)}


def wait(run: Run, process: subprocess.Popen, until: Callable[[], bool]) -> bool:
    """Watch the run until `until()` holds; False if it ended first. Every complete checkpoint is remembered."""
    while process.poll() is None:
        run.seen.update(run.complete())
        if until():
            return True
        time.sleep(0.001)
    return False


def reach_moment(run: Run, process: subprocess.Popen, draw: random.Random) -> bool:
    """Wait for a random moment of one of the three kinds; False if the run ended before it came."""

    def passed(seconds: float) -> Callable[[], bool]:
        end = time.monotonic() + seconds
        return lambda: time.monotonic() > end

    kind = draw.random()
    if kind < 0.1:
        return wait(run, process, passed(draw.uniform(0, 8)))
    if not wait(run, process, lambda: IN_THE_LOOP in run.output()) or not wait(run, process, passed(draw.random())):
        return False
    if kind < 0.43:
        if not wait(run, process, lambda: not run.saving()) or not wait(run, process, run.saving):
            return False
        time.sleep(draw.uniform(0, 0.015))
    return True


def kill(process: subprocess.Popen, campaign: Campaign, draw: random.Random) -> None:
    """SIGKILL to every process of the run, or to one rank alone; returns when all have ended."""
    launcher = psutil.Process(process.pid)  # be it as a zombie: nobody has waited for it yet
    ranks = launcher.children(recursive=True)
    one_rank = len(ranks) == 2 and draw.random() < 0.25
    for victim in [draw.choice(ranks)] if one_rank else [*ranks, launcher]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    began = time.monotonic()
    process.wait(timeout=TEARDOWN_SECONDS)
    _, alive = psutil.wait_procs(ranks, timeout=TEARDOWN_SECONDS)
    assert not [rank for rank in alive if rank.status() != psutil.STATUS_ZOMBIE]
    campaign.kills += 1
    if one_rank:
        campaign.kills_of_one_rank += 1
        campaign.slowest_teardown_seconds = max(campaign.slowest_teardown_seconds, time.monotonic() - began)


def look_for_losses(run: Run, campaign: Campaign) -> None:
    """Every checkpoint that was complete is there, or newer ones are; and all that are there are whole."""
    found, newest = run.complete(), max(run.seen, default="")
    if max(found, default="") < newest:
        campaign.lost.append(f"{run.folder.name}: {newest} had been complete, {found} are there")
    if len(found) < min(KEEP_LAST, len(run.seen)):
        campaign.lost.append(f"{run.folder.name}: {len(run.seen)} had been complete, {found} are there")
    for name in found:
        try:
            verify_checkpoint(run.folder / name)
        except ValueError as error:
            campaign.lost.append(f"{run.folder.name}: {error}")
    run.seen.update(found)


def until_it_ends(run: Run, campaign: Campaign, kills: int, draw: random.Random) -> None:
    """Start, kill, start … until the run is done; at most `kills` kills in the whole campaign."""
    while True:
        resume_from = max(run.complete(), default=None)
        process = run.start(draw.choice(campaign.processes))
        campaign.starts += 1
        if campaign.kills < kills and reach_moment(run, process, draw):
            kill(process, campaign, draw)
            output = run.output()
            began = IN_THE_LOOP in output
            campaign.kills_inside_a_save += run.saving()
            campaign.kills_before_the_loop += not began
        else:
            code, output, began = process.wait(), run.output(), True
            if code:
                raise RuntimeError(f"{run.folder} ended with exit code {code}:\n{output}")
        look_for_losses(run, campaign)
        if began and resume_from and f"resumed from {(run.folder / resume_from).resolve()}" not in output:
            campaign.lost.append(f"{run.folder.name}: {resume_from} was there, and the next start passed it over")
        if process.returncode == 0:
            campaign.runs += 1
            campaign.checkpoints_seen += len(run.seen)
            return


def run_campaign(
    campaign: Campaign, kills: int, *, folder: Path, dataset: Path, max_steps: int, draw: random.Random
) -> None:
    """An unbroken run, then runs that are killed until all `kills` are spent, each compared with it."""
    folder.mkdir()
    settings = {"dataset_dir": dataset, "max_steps": max_steps, "dropout": campaign.dropout}
    unbroken = Run(folder / "unbroken", **settings)
    until_it_ends(unbroken, Campaign(campaign.processes[:1]), 0, draw)
    expected = unbroken.fingerprint()
    while campaign.kills < kills:
        run = Run(folder / f"{campaign.runs:03}", **settings)
        until_it_ends(run, campaign, kills, draw)
        found = run.fingerprint()
        different = [what for what in expected | found if found.get(what) != expected.get(what)]
        campaign.mismatches += [f"{run.folder}: {what}" for what in different]
        print(f"{campaign.processes}: {campaign.kills} of {kills} kills", file=sys.stderr, flush=True)
        shutil.rmtree(run.folder)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--kills", type=int, default=200, help="over all campaigns (default: 200)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--max-steps", type=int, default=400, help="of a run (default: 400)")
    parser.add_argument("--dataset", type=Path, help="a prepared dataset (default: Python's documentation)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    began, draw = time.monotonic(), random.Random(options.seed)
    campaigns = [Campaign([processes]) for processes in options.processes]
    if len(campaigns) > 1:
        campaigns.append(Campaign(options.processes))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = options.dataset or prepare(source="python-docs", tokenizer="train:512", out=folder / "python-docs")
        for index, campaign in enumerate(campaigns):
            kills = options.kills * (index + 1) // len(campaigns) - options.kills * index // len(campaigns)
            settings = {"dataset": dataset, "max_steps": options.max_steps, "draw": draw}
            run_campaign(campaign, kills, folder=folder / str(index), **settings)
    report(campaigns)
    settings = {"kills": options.kills, "max_steps": options.max_steps, "seed": options.seed, "recipe": RECIPE}
    figures = {"seconds": round(time.monotonic() - began), "campaigns": [asdict(campaign) for campaign in campaigns]}
    finish({**figures, "settings": settings, "machine": machine()}, options.json)
    if any(campaign.lost or campaign.mismatches for campaign in campaigns):
        raise SystemExit(1)


def report(campaigns: list[Campaign]) -> None:
    """A column for each campaign, a row for each fact; then what was lost or differs."""
    for name in asdict(campaigns[0]):
        values = [getattr(campaign, name) for campaign in campaigns]
        shown = [len(value) if name in ("lost", "mismatches") else value for value in values]
        print_row(name.replace("_", " "), *map(str, shown))
    for campaign in campaigns:
        for problem in campaign.lost + campaign.mismatches:
            print(problem)


if __name__ == "__main__":
    run_command(main)
