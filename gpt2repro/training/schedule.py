"""The learning rate as a pure function of the step; nothing to save, nothing to step.

    python -m gpt2repro.training.schedule recipes/gpt2-124m-10b.yaml --output lr.png [--FIELD VALUE …]

draws what a recipe will do. Steps are optimizer steps, rates those of AdamW; a group of the optimizer takes its
`lr_ratio` of them.
"""

import argparse
import math
import sys
from pathlib import Path

from gpt2repro.cli import parse_recipe
from gpt2repro.training.arguments import Recipe


def lr_at(step: int, recipe: Recipe) -> float:
    """Learning rate of optimizer step `step` (0 is the first).

    Linear warm-up that reaches the peak at step `warmup_steps - 1`, then the recipe's schedule:

    - `cosine` from the peak to `min_lr_ratio` of it at `max_steps` (GPT-3 paper, appendix B);
    - `constant`;
    - warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4): the peak, then over the last `decay_ratio` of
      `max_steps` down to `min_lr_ratio`, x being the share of the decay that is over: by 1 - x (`wsd_linear`), or by
      1 - sqrt(x) (`wsd_sqrt`; Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
      Durations").
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
    return floor + (1.0 - (math.sqrt(progress) if recipe.schedule == "wsd_sqrt" else progress)) * (peak - floor)


def draw_schedule(recipe: Recipe, png: str | Path, *, title: str = "") -> None:
    """Write the learning rate over all steps as a PNG; with Muon its matrices' as a second curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    panel = figure.subplots()
    steps = sorted({round(i * (recipe.max_steps - 1) / 2000) for i in range(2001)})
    rates = [lr_at(step, recipe) for step in steps]
    panel.plot(steps, rates, label="AdamW" if recipe.optimizer == "muon" else None)
    if recipe.muon_learning_rate is not None:
        ratio = recipe.muon_learning_rate / recipe.learning_rate
        panel.plot(steps, [rate * ratio for rate in rates], label="Muon")
        panel.legend(frameon=False)
    panel.set(xlabel="optimizer step", ylabel="learning rate", title=title, ylim=(0, None))
    panel.grid(alpha=0.25)
    Path(png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png)


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="the recipe's YAML; every field of it is also a flag")
    parser.add_argument("--output", required=True, help="write the picture to this PNG file")
    arguments, fields = parser.parse_known_args()
    try:
        recipe = parse_recipe(["--recipe", arguments.recipe, *fields], default=arguments.recipe)
    except ValueError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    draw_schedule(recipe, arguments.output, title=Path(arguments.recipe).stem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
