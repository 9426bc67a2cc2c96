"""The folder of a run: whose it is, what is in it, and the record of how it was made.

    runs/NAME/
      run.json          recipe, dataset and model, and for every start: time, command, commit, versions, hardware
      recipe.yaml       the resolved recipe: running it runs the same
      metrics.jsonl     a row for each step, validation, benchmark and sample (run/metrics.py)
      step-00005000/    checkpoints, and the link `latest` (run/checkpoints.py)
      profile.json, curves.png

Nobody outside this package knows these names. A run that has claimed its folder holds the directory itself: it stays
the run's after `mv`, and another folder with the old name is not touched.
"""

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import torch

from gpt2repro.command import say
from gpt2repro.files import link_to, linked, sync, take_lock, write_whole
from gpt2repro.recipe import DEFINING_FIELDS, Recipe
from gpt2repro.recipe_parser import write_recipe
from gpt2repro.run import checkpoints
from gpt2repro.run.metrics import MetricsLog, read_metrics

RECORD, RECIPE, METRICS, LOCK = "run.json", "recipe.yaml", "metrics.jsonl", ".lock"
RECORD_FILES = (RECORD, RECIPE, METRICS)
PROFILE, CURVES = "profile.json", "curves.png"


class RunFolder:
    """The folder of one run. Reading works at any time; writing after `claim`, on the main process."""

    def __init__(self, path: str | Path) -> None:
        self._given = Path(path)
        self._descriptor: int | None = None  # of the open directory, once claimed
        self._lock: IO[str] | None = None
        self._record: dict[str, Any] = {}  # run.json as this process wrote it, once claimed

    @property
    def path(self) -> Path:
        """Where the folder is now.

        Raises:
            ValueError: the claimed folder was moved away, on a system that does not tell where to.
        """
        if self._descriptor is None:
            return self._given
        if self._given.exists() and os.path.samestat(os.stat(self._descriptor), self._given.stat()):
            return self._given
        link = f"/proc/self/fd/{self._descriptor}"
        if os.path.lexists(link):
            return Path(os.readlink(link))
        raise ValueError(f"{self._given} is not the folder of this run any more: move it back and start again")

    @property
    def root(self) -> Path:
        """The folder by a name that stays right while it is moved, to write in: that of the open directory."""
        link = Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")
        return link if link.exists() else self.path

    # ---- reading -------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any] | None:
        """run.json, or None where there is none; ValueError for a damaged one."""
        file = self.path / RECORD
        if not file.exists():
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            for name, kind in (("recipe", dict), ("dataset", dict), ("model", dict), ("starts", list)):
                if not isinstance(record[name], kind):
                    raise ValueError(f"{name} is {record[name]!r}")
            record["dataset"]["fingerprint"]
            return record
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} cannot be read ({error}): give another --output_dir, or put the file back"
            ) from None

    def rows(self, *, up_to: float = float("inf")) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, those after step `up_to` left out."""
        return [row for row in read_metrics(self.path / METRICS) if row["step"] <= up_to]

    def find_checkpoint(self, resume: str) -> Path | None:
        """The checkpoint that `resume` means; see `checkpoints.find_checkpoint`."""
        return checkpoints.find_checkpoint(self.path, resume)

    def load(self, checkpoint: Path, recipe: Recipe, *, fingerprint: str, **into: Any) -> int:
        """Load a checkpoint of this run, or of another to continue from it; called on every process, returns its step.

        `into` are `checkpoints.load_checkpoint`'s model, optimizer and accelerator.

        Raises:
            ValueError: a damaged checkpoint, one of another dataset, or one at or past the end of the run.
        """
        record = checkpoints.load_checkpoint(checkpoint, **into)
        if record["dataset_fingerprint"] != fingerprint:
            raise ValueError(f"{checkpoint} was trained on another dataset: start from its weights with --init_from")
        step, end = record["step"], recipe.max_steps
        if step > end or (step == end and checkpoint.parent != self.path.resolve()):
            raise ValueError(f"{checkpoint} is at step {step}, max_steps is {end}: give more steps")
        return step

    def check(self, recipe: Recipe, *, dataset: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
        """The record of the run that the folder is to hold, after checking that it holds no other. Writes nothing.

        `dataset` must have a `fingerprint`; `model` is what to record of the network.

        Raises:
            ValueError: the folder holds another run (what differs is named), something else, or a run that
                `resume: never` must not touch.
        """
        folder, before = self.path, self.record()
        record: dict[str, Any] = {"id": uuid4().hex[:8], "recipe": asdict(recipe), "dataset": dataset, "model": model}
        if before is None:
            names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
            left = {name for name in names if name.startswith(".step-")}  # by a kill during a download
            if names - left - {LOCK, f".{RECORD}.tmp"}:  # what a kill at the very start leaves
                raise ValueError(f"output_dir {folder} is not empty and holds no run: give another --output_dir")
            return record | {"starts": []}
        if recipe.resume == "never":
            raise ValueError(f"output_dir {folder} holds a run and resume is never: give another --output_dir")
        if differing := differences(before, recipe, dataset):
            longer = f" (and --resume {folder}/latest to train on from there with the new values)"
            is_longer = any(line.startswith("max_steps ") for line in differing)
            another = f"another --output_dir{longer if is_longer else ''}"
            raise ValueError(
                f"output_dir {folder} holds another run ({'; '.join(differing)}): give {another}, "
                "the same values to resume it, or delete it to begin again"
            )
        return record | {name: before[name] for name in ("id", "starts") if name in before}

    def with_its_steps(self, recipe: Recipe) -> Recipe:
        """The recipe with the steps with which this run began: `max_minutes` chooses them only then."""
        if not recipe.max_minutes or not (record := self.record()):
            return recipe
        steps = record["recipe"]["max_steps"]
        say(f"max_minutes chooses the steps of a new run; {self.path} has {steps:,}, and keeps them")
        return replace(recipe, max_steps=steps, max_minutes=0.0)

    # ---- writing -------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Make the folder this process's alone until it ends; a second call does nothing.

        Raises:
            ValueError: a folder that cannot be written, or one that another process trains in.
        """
        if self._lock is not None:
            return
        with self._explained():
            self._given.mkdir(parents=True, exist_ok=True)
            if sys.platform != "win32":  # where no folder can be opened
                self._descriptor = os.open(self._given, os.O_RDONLY)
            self._lock = take_lock(self.path / LOCK)

    def claim(self, recipe: Recipe, *, dataset: dict[str, Any], model: dict[str, Any], world_size: int) -> None:
        """Make the folder this run's until the process ends: lock it, and write run.json and recipe.yaml.

        Raises:
            ValueError: what `check` refuses, or what `lock` does.
        """
        self.lock()
        with self._explained():
            record = self.check(recipe, dataset=dataset, model=model)  # once more: nobody else can write now
            record["starts"].append(_start(world_size))
            self._record = record
            write_whole(self.path / RECORD, json.dumps(record, indent=2) + "\n")
            write_recipe(recipe, self.path / RECIPE)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            raise ValueError(f"another process trains in {self._given}: end it, or give another folder") from None
        except OSError as error:
            raise ValueError(
                f"output_dir {self._given} cannot be written ({error}): give another --output_dir"
            ) from error

    def take_in(self, found: dict[int, Path], record: dict[str, str], *, best: int | None) -> None:
        """Make checkpoints, folders on the same disk by their step, this run's, with the record of their copy.

        `best` is the step of the best one. The newest comes last: before that, a kill lets all be taken in again.
        """
        with self._explained():
            for name in RECORD_FILES:
                write_whole(self.path / name, record[name])
            if best is not None:
                link_to(self.path / f"step-{best:08d}", self.path / "best")
            for step, folder in sorted(found.items()):
                for file in folder.iterdir():
                    sync(file)
                os.replace(folder, self.path / f"step-{step:08d}")
            sync(self.path)

    @property
    def start(self) -> dict[str, Any]:
        """Which run this is, and which start of it, once claimed."""
        last = self._record["starts"][-1]
        return {"run": self._record["id"], **{name: last[name] for name in ("time", "host", "pid")}}

    def resume_from(self, checkpoint: Path | None, *, step: int) -> None:
        """Make `checkpoint`, of step `step`, the newest of the run; see `checkpoints.resume_from`."""
        checkpoints.resume_from(self.path, checkpoint, step=step)

    def mark_best(self, step: int) -> None:
        """Make `best` mean the checkpoint of step `step`; before the first save there is none to mean."""
        if (checkpoint := self.root / f"step-{step:08d}").is_dir():
            link_to(checkpoint, self.root / "best")

    @property
    def best(self) -> Path:
        """The checkpoint with the lowest validation loss, where `patience` keeps it; else the newest."""
        return best if (best := linked(self.path / "best")).is_dir() else self.latest

    @property
    def latest(self) -> Path:
        """The newest checkpoint: the link to it, or the folder itself where links are refused."""
        return linked(self.path / "latest")

    @property
    def profile(self) -> Path:
        """The file for the trace of a few steps."""
        return self.root / PROFILE

    def open_metrics(self, recipe: Recipe, *, step: int) -> MetricsLog:
        """metrics.jsonl without the rows after `step`, and the trackers beside it."""
        log = MetricsLog(self.path / METRICS, step=step, max_steps=recipe.max_steps)
        is_new = len(self._record["starts"]) == 1
        log.start_trackers(recipe, folder=self.path, run_id=self._record["id"], step=step, is_new=is_new)
        return log

    def save(self, step: int, recipe: Recipe, *, fingerprint: str, **what: Any) -> Path:
        """Save a checkpoint; called on every process, see `checkpoints.save_checkpoint`.

        Raises:
            ValueError: it cannot be saved, or another process has claimed the folder.
        """
        what["state"] = {"tokens": step * recipe.global_batch_tokens, "dataset_fingerprint": fingerprint}
        what["keep_last"], what["keep_every"] = recipe.keep_last, recipe.keep_every
        return checkpoints.save_checkpoint(self.root, step, check=self._refuse_a_second_writer, **what)

    def _refuse_a_second_writer(self) -> None:
        """The lock does not show one on a disk whose locks do nothing, or only on one machine."""
        record = self.record()
        if record and (last := record["starts"][-1]) != self._record["starts"][-1]:
            raise ValueError(
                f"another process has started in {self.path} since ({last['host']}, process {last['pid']}), so this "
                "one does not save and ends"
            )

    def release(self) -> None:
        """Let others have the folder. A process that is killed lets them have it too."""
        if self._lock is not None:
            with contextlib.suppress(PermissionError):  # Windows deletes no open file; then it stays
                (self.root / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def record_of(run_dir: Path) -> dict[str, str]:
    """The run's record, text by file name: what a copy of a checkpoint needs beside it to be resumed."""
    return {name: (run_dir / name).read_text(encoding="utf-8") for name in RECORD_FILES}


def differences(before: dict[str, Any], recipe: Recipe, dataset: dict[str, Any]) -> list[str]:
    """What of a recorded run is another in this recipe and dataset; empty for the same run."""
    if recipe.max_minutes:  # chooses the steps of a new run only
        recipe = replace(recipe, max_steps=before["recipe"]["max_steps"])
    new, defaults = (json.loads(json.dumps(asdict(each))) for each in (recipe, Recipe()))  # lists, as in the file
    old = defaults | before["recipe"]  # a newer field had its default
    differing = [f"{name} is {old[name]!r} there and {new[name]!r} here"
                 for name in DEFINING_FIELDS if old[name] != new[name]]  # fmt: skip
    if before["dataset"]["fingerprint"] != dataset["fingerprint"]:
        differing.append("the dataset is another one")
    return differing


def _start(world_size: int) -> dict[str, Any]:
    """When, with what and on what this start of the run happened."""
    cuda = torch.cuda.is_available()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "pid": os.getpid(),
        "command": shlex.join(sys.argv),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "processes": world_size,
        "hardware": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "accelerate", "safetensors", "numpy")},
        },
    }


def _git(*command: str) -> str | None:
    """What git says of the checkout that the running script stands in, or None outside of one."""
    folder = Path(sys.argv[0]).resolve().parent
    try:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
