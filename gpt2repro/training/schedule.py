"""The learning rate as a pure function of the step; nothing to save, nothing to step."""

import math

from gpt2repro.training.arguments import Recipe


def lr_at(step: int, recipe: Recipe) -> float:
    """Learning rate of optimizer step `step` (0 is the first).

    Linear warm-up that reaches the peak at step `warmup_steps - 1`, then the recipe's schedule: `cosine` from the peak
    to `min_lr_ratio` of it at `max_steps` (GPT-3 paper, appendix B), or `constant`.
    """
    peak, warmup = recipe.learning_rate, recipe.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if recipe.schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / (recipe.max_steps - warmup))
    floor = peak * recipe.min_lr_ratio
    return floor + 0.5 * (1.0 + math.cos(math.pi * progress)) * (peak - floor)
