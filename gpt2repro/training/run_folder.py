"""The folder of a run: whose it is, and the record of how it was made (run.json)."""

import contextlib
import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch

from gpt2repro.training.arguments import DEFINING_FIELDS, Recipe

RUN_RECORD = "run.json"
UNFINISHED_RECORD = f".{RUN_RECORD}.tmp"  # all that a kill at the very start leaves behind


def check_run_folder(recipe: Recipe, *, dataset: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """The record of the run that `output_dir` is to hold, after checking that it holds no other. Nothing is written.

    `dataset` must have a `fingerprint`; `model` is what to record of the network. run.json keeps every start.

    Raises:
        ValueError: the folder holds another run (what differs is named), something else, or a run that `resume: never`
            must not touch.
    """
    folder = Path(recipe.output_dir)
    record: dict[str, Any] = {"recipe": asdict(recipe), "dataset": dataset, "model": model, "starts": []}
    if (folder / RUN_RECORD).exists():
        before = _read(folder / RUN_RECORD)
        if recipe.resume == "never":
            raise ValueError(f"output_dir {folder} holds a run and resume is never: give another --output_dir")
        old, new = asdict(Recipe()) | before["recipe"], record["recipe"]  # a field that came later had its default
        differing = [f"{name} is {old[name]!r} there and {new[name]!r} here" for name in DEFINING_FIELDS
                     if old[name] != new[name]]  # fmt: skip
        if before["dataset"]["fingerprint"] != dataset["fingerprint"]:
            differing.append("the dataset is another one")
        if differing:
            raise ValueError(
                f"output_dir {folder} holds another run ({'; '.join(differing)}): give another --output_dir, "
                "the same values to go on with it, or delete it to begin anew"
            )
        record["starts"] = before["starts"]
    elif folder.is_dir() and {path.name for path in folder.iterdir()} - {UNFINISHED_RECORD}:
        raise ValueError(f"output_dir {folder} is not empty and holds no run: give another --output_dir")
    return record


def write_run_record(folder: Path, record: dict[str, Any], *, world_size: int) -> list[BinaryIO]:
    """Make `folder` the run's: add this start to its record and write it as run.json.

    The files that come back keep other starts out of the folder for as long as they are open: until the process ends,
    however it ends.

    Raises:
        ValueError: the folder cannot be written, or another process trains in it.
    """
    aside, final = folder / UNFINISHED_RECORD, folder / RUN_RECORD
    record["starts"].append(_start(world_size))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder):
            held = [_hold(final)] if final.exists() else []
            aside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            with aside.open("rb") as file:
                os.fsync(file.fileno())  # or a power cut could leave an empty run.json, which refuses every start
            os.replace(aside, final)
            return [*held, _hold(final)]
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be written ({error}): give another --output_dir") from error


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let two first starts write their record one after the other, so that the second finds the first one's held."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _hold(path: Path) -> BinaryIO:
    """Lock a file; where the file system has no locks, go on without."""
    file = path.open("r+b")
    with contextlib.suppress(OSError):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process trains in {path.parent}: end it, or give another folder") from None
    return file


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["recipe"], record["dataset"]["fingerprint"], record["starts"]
        return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): give another --output_dir, or put the file back") from None


def _start(world_size: int) -> dict[str, Any]:
    """When, with what and on what this start of the run happened."""
    cuda = torch.cuda.is_available()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
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
    try:
        done = subprocess.run(
            ["git", *command],
            cwd=Path(sys.argv[0]).resolve().parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
