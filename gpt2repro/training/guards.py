"""What keeps a run safe while nobody looks: stops by signal, the rule for bad steps, errors that all share."""

import math
import os
import signal
import time
from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from gpt2repro.training.arguments import Recipe

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
    """The rule for a step whose loss or gradient norm is not finite: no update; skip it or stop the run."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.in_a_row = 0

    def is_bad(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether step `step` (1-based) must not be applied.

        Raises:
            ValueError: `on_bad_step` is stop, or more than `max_bad_steps` came in a row.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        what = f"step {step} is bad: loss {loss}, gradient norm {grad_norm}"
        if self.recipe.on_bad_step == "stop":
            raise ValueError(
                f"{what}; on_bad_step is stop: resume from the last checkpoint with a lower learning_rate"
            )
        if self.in_a_row > self.recipe.max_bad_steps:
            raise ValueError(
                f"{what}; {self.in_a_row} in a row are more than max_bad_steps={self.recipe.max_bad_steps}"
            )
        return True


def on_main_process(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """Run `action` on the main process while the others wait for it.

    Raises:
        ValueError: on every process, with the main one's message, when it failed there.
    """
    message: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except (OSError, ValueError) as error:
            message = [str(error)]
    broadcast_object_list(message)
    if message[0] is not None:
        raise ValueError(message[0])
