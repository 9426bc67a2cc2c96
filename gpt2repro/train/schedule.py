"""The learning rate: a pure function of the step, with nothing to save.

Steps are optimizer steps. The rate is AdamW's; that of a parameter group is this rate times the group's `lr_ratio`.
"""

import math

from gpt2repro.recipe import Recipe


def lr_at(step: int, recipe: Recipe) -> float:
    """Learning rate of optimizer step `step` (0 is the first).

    Linear warm-up that reaches the peak at step `warmup_steps - 1`, then the recipe's schedule:

    - `cosine` from the peak to `min_lr_ratio` of it at `max_steps` (GPT-3 paper, appendix B);
    - `constant`;
    - warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4): the peak, then over the last `decay_ratio` of
      `max_steps` down to `min_lr_ratio`. With x the share of the decay that is over, the rate falls as 1 - x
      (`wsd_linear`), as 1 - sqrt(x) (`wsd_sqrt`; Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training
      Beyond Fixed Training Durations"), or as 1 - x**2 (`wsd_concave`).
    """
    peak, warmup = recipe.learning_rate, recipe.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if recipe.schedule == "constant":
        return peak
    floor = peak * recipe.min_lr_ratio
    if recipe.schedule == "cosine":
        progress = min(1.0, (step - warmup) / (recipe.max_steps - warmup))
        return floor + 0.5 * (1.0 + math.cos(math.pi * progress)) * (peak - floor)
    decay_steps = recipe.decay_ratio * recipe.max_steps
    progress = min(1.0, max(0.0, (step - (recipe.max_steps - decay_steps)) / decay_steps))
    power = {"wsd_linear": 1.0, "wsd_sqrt": 0.5, "wsd_concave": 2.0}[recipe.schedule]
    return floor + (1.0 - progress**power) * (peak - floor)
