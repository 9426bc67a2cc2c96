"""train_accelerate.py that pauses where a test says, so that a signal or a kill comes at that place on any machine.

The file $PAUSE_AT names the place: "step 5" (its beginning), "validation" or "save" (the first one, in the middle of
it). A process that reaches it writes $PAUSE_AT.RANK and waits until $PAUSE_AT is deleted or a signal asks it to stop.
$LOSS_SCALE is the scale that fp16 begins with; it then doubles after every second good step.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_accelerate
from gpt2repro.eval import in_training
from gpt2repro.run import checkpoints

PAUSE_AT = Path(os.environ["PAUSE_AT"])
signals = []


class KnownStopSignal(train_accelerate.StopSignal):
    def __init__(self) -> None:
        super().__init__()
        signals.append(self)


def pause(place: str) -> None:
    if PAUSE_AT.exists() and PAUSE_AT.read_text() == place:
        Path(f"{PAUSE_AT}.{os.environ.get('RANK', 0)}").touch()
        while PAUSE_AT.exists() and not any(stop.received for stop in signals):
            time.sleep(0.005)


def pausing(function, place):
    """`function`, with a pause before it; `place` names it and gets the function's first argument."""

    def paused(first, *arguments, **settings):
        pause(place(first))
        return function(first, *arguments, **settings)

    return paused


if __name__ == "__main__":
    if scale := os.environ.get("LOSS_SCALE"):
        torch.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=float(scale), growth_interval=2)
    train_accelerate.StopSignal = KnownStopSignal
    train_accelerate.lr_at = pausing(train_accelerate.lr_at, lambda step: f"step {step + 1}")  # it counts from 0
    in_training.validation_loss = pausing(in_training.validation_loss, lambda model: "validation")
    # It writes the optimizer's state; the weights are in the hidden folder by then.
    checkpoints.save_file = pausing(checkpoints.save_file, lambda tensors: "save")
    sys.exit(train_accelerate.main())
