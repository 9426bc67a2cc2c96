"""Tiny training runs that can be broken: start, kill, resume and compare them with an unbroken one.

A start is a process of its own, forked from one that has imported everything, so it takes a second.
"""

import contextlib
import os
import pty
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

import train_accelerate
from gpt2repro import command
from gpt2repro.files import file_sha256
from gpt2repro.run.checkpoints import OPTIMIZER, RECORD, verify_checkpoint
from gpt2repro.run.folder import RunFolder

PATIENCE = 1200.0  # seconds after which a start hangs; on a busy machine a compilation takes ten minutes
KEEP_LAST = 2
FLAGS = {
    "model": "demo", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32, "seq_len": 32, "dropout": 0.1,
    "global_batch_tokens": 256, "micro_batch_size": 4, "warmup_steps": 2, "learning_rate": 3e-3, "max_steps": 12,
    "eval_every": 6, "eval_tokens": 256, "sample_every": 0, "save_every": 2, "keep_last": KEEP_LAST,
    "mixed_precision": "no", "compile": "false",
}  # fmt: skip


class Broken(Exception):
    """A promise that did not hold."""


class Hung(Exception):
    """A start that did not end."""


class TooLate(Exception):
    """The run had ended before the fault came: the try is repeated."""


def must(condition: object, what: str) -> None:
    if not condition:
        raise Broken(what)


class Start:
    """A forked process that does `action`; what it prints comes through a pipe or a terminal."""

    def __init__(
        self, action: Callable[[], int | None], *, terminal: bool = False, environment: dict[str, str] | None = None
    ) -> None:
        self.reader, writer = pty.openpty() if terminal else os.pipe()
        os.set_blocking(self.reader, False)
        self.exit_code: int | None = None
        self._printed = b""
        self.pid = os.fork()
        if self.pid:
            os.close(writer)
            return
        code: int | None = 1
        try:
            os.close(self.reader)
            if terminal:
                os.login_tty(writer)
            else:
                os.dup2(writer, 1)
                os.dup2(writer, 2)
            sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
            os.environ.update(environment or {})
            # So that bits compare; of two processes Accelerate would set another number of threads than of one.
            torch.set_num_threads(1)
            os.environ["OMP_NUM_THREADS"] = "1"
            code = action()
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code or 0)

    def is_alive(self) -> bool:
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.exit_code = os.waitstatus_to_exitcode(status) if pid else None
        return self.exit_code is None

    def printed(self) -> str:
        with contextlib.suppress(OSError):  # nothing new, or closed
            while chunk := os.read(self.reader, 65536):
                self._printed += chunk
        return self._printed.decode(errors="replace")

    def wait_until(self, condition: Callable[[], object], *, patience: float = PATIENCE) -> None:
        """Return when `condition` holds; it must hold while the process is alive."""
        deadline = time.monotonic() + patience
        while not condition():
            if not self.is_alive():
                raise TooLate(self.printed())
            if time.monotonic() > deadline:
                self.kill()
                raise Hung(self.printed()[-500:])
            time.sleep(0.001)

    def send_signal(self, name: str) -> None:
        os.kill(self.pid, getattr(signal, name))

    def kill(self) -> None:
        """SIGKILL to the process and all that it started."""
        if self.is_alive():
            process = psutil.Process(self.pid)
            for victim in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
            while self.is_alive():
                time.sleep(0.001)

    def end(self, *codes: int, patience: float = PATIENCE) -> str:
        """Wait for the end, which must come with one of `codes`; returns what was printed."""
        with contextlib.suppress(TooLate):
            self.wait_until(lambda: self.printed() is None, patience=patience)
        printed = self.printed()
        with contextlib.suppress(OSError):
            os.close(self.reader)
        must(self.exit_code in codes, f"exit code {self.exit_code}, not one of {codes}:\n{printed[-2000:]}")
        must("\nTraceback" not in f"\n{printed}", f"a traceback:\n{printed[-2000:]}")
        return printed


@dataclass
class Try:
    """One run with its dataset in a folder of its own, and what the unbroken run gave."""

    folder: Path
    random: random.Random
    faults: int = 1  # to inject in this try
    expected: dict[str, Any] | None = None
    seconds: float = 0.0  # of an unbroken run

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"

    def start(
        self, patch: Callable[[], None] = lambda: None, *, terminal: bool = False, environment: dict | None = None,
        **changes: Any,
    ) -> Start:  # fmt: skip
        """Start the run, after a change of its process; the next start resumes it."""
        recipe = FLAGS | {"output_dir": self.run, "dataset_dir": self.dataset} | changes
        flags = [word for name, value in recipe.items() for word in (f"--{name}", str(value))]
        own = {"XDG_CACHE_HOME": str(self.folder), "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor")}

        def train() -> int:
            patch()
            return train_accelerate.main(flags)

        return Start(train, terminal=terminal, environment=own | (environment or {}))

    def random_moment(self, start: Start, seconds: float | None = None) -> None:
        """Wait for a random part of `seconds`, or of the time that an unbroken run takes."""
        moment = time.monotonic() + self.random.uniform(0, self.seconds if seconds is None else seconds)
        start.wait_until(lambda: time.monotonic() > moment)

    def moment_in_the_loop(self, start: Start) -> None:
        start.wait_until(lambda: any(row["kind"] == "train" for row in RunFolder(self.run).rows()))
        self.random_moment(start, self.seconds / 3)

    def complete(self) -> list[str]:
        """The names of the complete checkpoints, oldest first."""
        return sorted(path.parent.name for path in self.run.glob(f"step-*/{RECORD}"))

    def resume(self, **changes: Any) -> None:
        """Start once more, which must resume from the newest checkpoint and end like the unbroken run."""
        complete = self.complete()
        for name in complete:
            verify_checkpoint(self.run / name)
        printed = self.start(**changes).end(command.DONE)
        newest = (self.run / max(complete, default="")).resolve()
        must(not complete or f"resumed from {newest}" in printed, f"not resumed from {newest}:\n{printed}")
        self.check()

    def result(self) -> dict[str, Any]:
        """What must be equal: hashes of the last weights and optimizer state, and every logged loss, once."""
        rows = [row for row in RunFolder(self.run).rows() if "loss" in row]
        files = {name: file_sha256(self.run / "latest" / name) for name in ("model.safetensors", OPTIMIZER)}
        losses = {f"{row['kind']} loss of step {row['step']}": row["loss"] for row in rows}
        return {**files, **losses, "number of losses": len(rows)}

    def check(self) -> None:
        found, expected = self.result(), self.expected or {}
        different = [name for name in expected | found if found.get(name) != expected.get(name)]
        must(not different, f"another result than that of the unbroken run: {', '.join(different)}")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip_a_bit(file: Path, chance: random.Random) -> Callable[[], object]:
    """Flip a random bit of a file; returns what puts the file back."""
    before = file.read_bytes()
    changed = bytearray(before)
    changed[chance.randrange(len(before))] ^= 1 << chance.randrange(8)
    file.write_bytes(changed)
    return lambda: file.write_bytes(before)
