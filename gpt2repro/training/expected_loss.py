"""The loss that GPT-2 124M should have after so many tokens of FineWeb-Edu, and a word when a run's is elsewhere.

The middle of the band is one complete public log: the validation losses of build-nanogpt's recipe (AdamW, batches of
524,288 tokens) in log/log.txt of github.com/ashegde/build-nanoGPT. Its width is set by what is known of other runs:

- 8 % above: in build-nanogpt's pull request 30 a sound run has 6.16 after 250 steps (the log: 5.93) and 4.15 after
  1000, one whose gradients were not synchronised 6.43 and 4.88. A public run that went wrong ended at 3.40 (the log:
  3.04), four sound ones at 3.03 to 3.09. The band ends at 3.29: all of these fall on the right side.
- 20 % below: better optimizers are meant to be faster, but what is lower than that has seen its validation text.
"""

import math
from typing import Any

# (steps of 524,288 tokens, validation loss in nats a token)
LOG = ((0, 10.951), (250, 5.933), (500, 4.988), (750, 4.320), (2000, 3.594), (2500, 3.518), (5250, 3.322),
       (5750, 3.297), (10_000, 3.177), (18_750, 3.053), (19_072, 3.045))  # fmt: skip
STEP_TOKENS = 524_288
ABOVE, BELOW = 1.08, 0.80


def expected_loss(tokens: int) -> tuple[float, float]:
    """The lowest and the highest loss to expect, nats a token; after the log's 10B tokens those of its end."""

    def place(step: float) -> float:  # between the points the loss falls about evenly over this
        return math.log(step + 20)

    step = min(tokens / STEP_TOKENS, LOG[-1][0])
    after = next(index for index in range(1, len(LOG)) if LOG[index][0] >= step)
    (step_0, loss_0), (step_1, loss_1) = LOG[after - 1], LOG[after]
    middle = loss_0 + (loss_1 - loss_0) * (place(step) - place(step_0)) / (place(step_1) - place(step_0))
    return BELOW * middle, ABOVE * middle


def has_expected_loss(dataset_info: dict[str, Any], config: Any, *, init_from: str | None) -> bool:
    """Whether a run is one that the log speaks of: GPT-2 124M from scratch on FineWeb-Edu with GPT-2's vocabulary."""
    source = dataset_info.get("source") or {}
    shape = (config.n_layer, config.n_embd, config.n_positions, config.vocab_size)
    on_fineweb_edu = source.get("dataset") == "HuggingFaceFW/fineweb-edu"
    return on_fineweb_edu and shape == (12, 768, 1024, 50257) and init_from is None


def loss_warning(tokens: int, loss: float) -> str | None:
    """A line for a validation loss that leaves the band after `tokens` trained tokens; None inside it."""
    low, high = expected_loss(tokens)
    if low <= loss <= high:
        return None
    what = f"the validation loss {loss:.3f} is outside of {low:.2f} to {high:.2f}, expected after {tokens:,} tokens"
    if loss < low:
        return f"{what}: is the validation text part of the training text?"
    return f"{what}: compare the recipe with recipes/gpt2-124m-10b.yaml, or run python -m eval.doctor"
