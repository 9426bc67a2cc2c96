"""What keeps an unattended run safe: stops by signal, the rule for bad steps, a watchdog, readable failures."""

import contextlib
import math
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

from gpt2repro.recipe import Recipe

OUTLIER_WINDOW = 128  # steps; llm.c's OUTLIER_DETECTOR_WINDOW_SIZE
ONE_STOP_SECONDS = 2.0
MAX_OVERFLOWS = 20  # in a row; each halves the loss scale
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGXCPU")


class StopSignal:
    """Turns the signals that end a process into a flag that the loop reads at the end of a step; a second one kills.

    A signal that the process was told to ignore (nohup: SIGHUP) stays ignored. A scheduler signals every process of a
    job, and the launcher, one of them, passes its own signal on to the ranks: what arrives within ONE_STOP_SECONDS of
    the first signal is the same stop. A launcher that was killed alone is a stop as well.
    """

    def __init__(self) -> None:
        self.received: int = 0
        self.received_at = 0.0
        launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
        self._launcher = os.getppid() if launched else None
        for name in STOP_SIGNALS:
            number = getattr(signal, name, None)  # Windows has only some of them
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)

    def wanted(self) -> bool:
        """Whether this process was told to stop, or lost its launcher."""
        return bool(self.received) or (self._launcher is not None and os.getppid() != self._launcher)

    def _receive(self, number: int, frame: object) -> None:
        if not self.received:
            self.received, self.received_at = number, time.monotonic()
        elif time.monotonic() - self.received_at > ONE_STOP_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class EarlyStop:
    """Says when `patience` validations in a row brought no new best loss. `rows` are those of the run so far."""

    def __init__(self, recipe: Recipe, rows: Sequence[dict[str, Any]] = ()) -> None:
        self.patience = recipe.patience
        self.losses: dict[int, float] = {}
        for row in rows:
            if row["kind"] == "val":
                self.add(row["step"], row["loss"])

    def add(self, step: int, loss: float | None) -> None:
        self.losses[step] = loss if loss is not None and math.isfinite(loss) else math.inf

    @property
    def best(self) -> int | None:
        """The step with the lowest loss, of equal ones the first; None without patience."""
        return min(self.losses, key=self.losses.__getitem__) if self.patience and self.losses else None

    def reason(self) -> str | None:
        """Why the run should end now; None while it should go on."""
        if (best := self.best) is None or sum(step > best for step in self.losses) < self.patience:
            return None
        last = f"validation loss {self.losses[max(self.losses)]:.4f}"
        return f"{last}, no new best in {self.patience} validations since {self.losses[best]:.4f} at step {best}"


class BadSteps:
    """The rule for a bad step: no update, and the run skips it or stops.

    A step is bad if its loss or gradient norm is not finite, or if its gradient norm is exactly zero. With `outlier_z`
    above 0 it is also bad if one of them lies that many standard deviations above the mean of the last OUTLIER_WINDOW
    steps, itself included (llm.c's rule; before that many steps nothing is an outlier). `rows` are a resumed run's
    rows of metrics.jsonl so far: the bad steps at their end count for `max_bad_steps`.
    """

    def __init__(self, recipe: Recipe, rows: Sequence[dict[str, Any]] = ()) -> None:
        self.recipe = recipe
        self.overflows_in_a_row = 0
        self._windows: dict[str, deque[float]] = {name: deque(maxlen=OUTLIER_WINDOW) for name in ("loss", "grad_norm")}
        train = [row for row in rows if row["kind"] == "train"]
        for row in train[-OUTLIER_WINDOW:]:
            self._z_scores(row.get("loss"), row.get("grad_norm"))
        bad = {row["step"] for row in rows if row["kind"] == "bad_step"}
        self.in_a_row = sum(1 for _ in takewhile(lambda row: row["step"] in bad, reversed(train)))

    def overflowed(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether fp16 could not hold the scaled gradients of step `step`, whose loss is finite: no bad step.

        Raises:
            ValueError: MAX_OVERFLOWS came in a row.
        """
        if not math.isfinite(loss) or math.isfinite(grad_norm):
            self.overflows_in_a_row = 0
            return False
        self._z_scores(loss, None)
        self.overflows_in_a_row += 1
        if self.overflows_in_a_row >= MAX_OVERFLOWS:
            raise ValueError(
                f"the gradients of {MAX_OVERFLOWS} steps in a row, up to step {step}, overflow fp16 at every loss "
                "scale: resume with --mixed_precision no, or with a lower learning_rate"
            )
        return True

    def reason(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Why step `step` (1-based) must not be applied; None for a good one.

        Raises:
            ValueError: `on_bad_step` is stop, or more than `max_bad_steps` came in a row.
        """
        z_scores = self._z_scores(loss, grad_norm)
        problem = f"loss {loss}, gradient norm {grad_norm}"
        if math.isfinite(loss) and math.isfinite(grad_norm) and grad_norm:
            if not self.recipe.outlier_z or max(z_scores) <= self.recipe.outlier_z:
                self.in_a_row = 0
                return None
            problem += f", {z_scores[0]:.1f} and {z_scores[1]:.1f} standard deviations above the mean"
        self.in_a_row += 1
        if self.recipe.on_bad_step == "stop":
            raise ValueError(
                f"step {step} is bad: {problem}; on_bad_step is stop: resume from the last checkpoint with a lower "
                "learning_rate"
            )
        if self.in_a_row > self.recipe.max_bad_steps:
            raise ValueError(
                f"step {step} is bad: {problem}; {self.in_a_row} in a row are more than "
                f"max_bad_steps={self.recipe.max_bad_steps}"
            )
        return problem

    def _z_scores(self, loss: float | None, grad_norm: float | None) -> tuple[float, float]:
        """Take a step into the windows; how many standard deviations its loss and norm lie above the means."""
        scores = []
        for window, value in zip(self._windows.values(), (loss, grad_norm), strict=True):
            if value is None or not math.isfinite(value):  # a bad row of metrics.jsonl holds null
                scores.append(0.0)
                continue
            window.append(value)
            spread = statistics.pstdev(window) if len(window) == OUTLIER_WINDOW else 0.0
            scores.append((value - statistics.fmean(window)) / spread if spread else 0.0)
        return scores[0], scores[1]


class Watchdog:
    """Ends a process that makes no progress for `minutes`, after it has said where it hangs; 0 turns it off.

    Progress is a new `step`, or a main thread that stands elsewhere than a moment ago: a long evaluation is progress.
    faulthandler's timer cannot tell that, and goes on while a process is suspended. Of several processes, those that
    wait for another one stand in a collective; the other one shows where it hangs.
    """

    def __init__(self, minutes: float, *, rank: int, step: int = 0) -> None:
        self.step = step
        self._seconds, self._rank = minutes * 60, rank
        self._over = threading.Event()
        if minutes:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        main = threading.main_thread().ident or 0
        pause = min(5.0, self._seconds / 20)
        last, same = None, 0  # looks are counted: a clock goes on while a process is suspended
        while not self._over.wait(pause):
            stack = traceback.walk_stack(sys._current_frames().get(main))
            now = self.step, [(frame.f_code, line) for frame, line in stack]
            last, same = now, same + 1 if now == last else 0
            if same * pause >= self._seconds:
                where = [f"{code.co_filename}:{line} {code.co_name}" for code, line in now[1]]
                text = f"error on process {self._rank}: no progress for {self._seconds / 60:g} minutes, in step "
                text += f"{self.step + 1}, at:\n  " + "\n  ".join(where[:12])
                with contextlib.suppress(OSError, ValueError):  # the terminal is closed
                    print(f"{text}\nRun the same command again to resume.", file=sys.stderr, flush=True)
                time.sleep(min(10.0, self._seconds / 5))  # so that every process has said where it is
                os._exit(1)


def explanation(error: RuntimeError) -> str | None:
    """What a person can do about an error of PyTorch; None for one that is a fault of the program."""
    if isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error):
        return "another process ended first, see its error; run the same command again"
    # The card's memory has an exception type of its own, the host's has none.
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return f"{str(error).splitlines()[0]} Lower micro_batch_size, or turn gradient_checkpointing on"
    return None
