"""train_accelerate.py that waits where a test says: what the test then does to it falls there on any machine.

The file $HELD_AT names the place: "step 5" (its beginning), "validation" or "save" (the first that comes, in the midst
of it). A process that comes there makes $HELD_AT.RANK and waits until $HELD_AT is gone or it is told to stop.
"""

import os
import sys
import time
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_accelerate
from gpt2repro.run import checkpoints

HELD_AT = Path(os.environ["HELD_AT"])


class HeldRun(train_accelerate.Run):
    def hold(self, place: str) -> None:
        if HELD_AT.exists() and HELD_AT.read_text() == place:
            Path(f"{HELD_AT}.{self.rank}").touch()
            while HELD_AT.exists() and not self.stop.received:
                time.sleep(0.005)

    def optimize(self, step: int) -> tuple[float, float, bool]:
        self.hold(f"step {step}")
        return super().optimize(step)

    def validate(self, step: int) -> None:
        self.hold("validation")
        super().validate(step)

    def save(self, step: int) -> None:
        def held_save_file(*arguments) -> None:  # of the optimizer: the weights are in the hidden folder by then
            self.hold("save")
            save_file(*arguments)

        checkpoints.save_file = held_save_file
        super().save(step)


if __name__ == "__main__":
    train_accelerate.Run = HeldRun
    sys.exit(train_accelerate.main())
