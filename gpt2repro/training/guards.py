"""What keeps a run safe while nobody looks: stops by signal, the rule for bad steps, a watchdog, shared errors."""

import math
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from gpt2repro.training.arguments import Recipe

OUTLIER_WINDOW = 128  # steps; llm.c's OUTLIER_DETECTOR_WINDOW_SIZE
STOPPED_BY_SIGNAL = 75  # EX_TEMPFAIL of sysexits.h: run the same command again to go on
ONE_STOP_SECONDS = 2.0


class StopSignal:
    """Turns SIGTERM, SIGINT and SIGUSR2 into a flag that the loop reads at a step's end; a second signal kills.

    A scheduler signals every process of a job, and the launcher, one of them, passes its own on to the ranks: what
    comes within ONE_STOP_SECONDS of the first signal is the same stop.
    """

    def __init__(self) -> None:
        self.received: int = 0
        self.received_at = 0.0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        if not self.received:
            self.received, self.received_at = number, time.monotonic()
        elif time.monotonic() - self.received_at > ONE_STOP_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class BadSteps:
    """The rule for a bad step: no update; skip it or stop the run.

    Bad is a loss or a gradient norm that is not finite, and with `outlier_z` above 0 one that lies that many standard
    deviations above the mean of the last OUTLIER_WINDOW steps, itself among them (llm.c's rule for both; before that
    many steps nothing is an outlier). `rows` are the train rows of a resumed run so far.
    """

    def __init__(self, recipe: Recipe, rows: Sequence[dict[str, Any]] = ()) -> None:
        self.recipe = recipe
        self.in_a_row = 0
        self._windows: dict[str, deque[float]] = {name: deque(maxlen=OUTLIER_WINDOW) for name in ("loss", "grad_norm")}
        for row in rows[-OUTLIER_WINDOW:]:
            self._z_scores(row["loss"], row["grad_norm"])

    def reason(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Why step `step` (1-based) must not be applied; None for a good one.

        Raises:
            ValueError: `on_bad_step` is stop, or more than `max_bad_steps` came in a row.
        """
        z_scores = self._z_scores(loss, grad_norm)
        found = f"loss {loss}, gradient norm {grad_norm}"
        if math.isfinite(loss) and math.isfinite(grad_norm):
            if not self.recipe.outlier_z or max(z_scores) <= self.recipe.outlier_z:
                self.in_a_row = 0
                return None
            found += f", {z_scores[0]:.1f} and {z_scores[1]:.1f} standard deviations above the mean"
        self.in_a_row += 1
        if self.recipe.on_bad_step == "stop":
            raise ValueError(
                f"step {step} is bad: {found}; on_bad_step is stop: resume from the last checkpoint with a lower "
                "learning_rate"
            )
        if self.in_a_row > self.recipe.max_bad_steps:
            raise ValueError(
                f"step {step} is bad: {found}; {self.in_a_row} in a row are more than "
                f"max_bad_steps={self.recipe.max_bad_steps}"
            )
        return found

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
    """Ends a process that makes no progress for `minutes`, after saying where it hangs; 0 turns it off.

    Progress is a new `step` or a main thread that stands elsewhere than a moment ago, so a long evaluation is none. Of
    several processes those that wait for another say so (they stand in a collective), and the other one where it is.
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
        seen, same = None, 0  # looks are counted, since a clock goes on while a process is suspended
        while not self._over.wait(pause):
            stack = traceback.walk_stack(sys._current_frames().get(main))
            now = self.step, [(frame.f_code, line) for frame, line in stack]
            seen, same = now, same + 1 if now == seen else 0
            if same * pause >= self._seconds:
                where = [f"{code.co_filename}:{line} {code.co_name}" for code, line in now[1]]
                print(
                    f"error on process {self._rank}: no progress for {self._seconds / 60:g} minutes, in step "
                    f"{self.step + 1}, at:\n  " + "\n  ".join(where[:12]) + "\nRun the same command again to go on.",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                time.sleep(min(10.0, self._seconds / 5))  # so that every process has said where it is
                os._exit(1)


def on_main_process(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """Run `action` on the main process while the others wait for it; what it returns, on all of them.

    Raises:
        ValueError: on every process, with the main one's message, when it failed there.
    """
    outcome: list[Any] = [None, None]  # what came back, and the message of a failure
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except (OSError, ValueError) as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]
