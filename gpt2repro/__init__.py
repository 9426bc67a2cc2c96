"""The library behind the commands: recipe, data, training, the run's folder, the Hub, tools around a run."""

from pathlib import Path

__version__ = "0.1.0"

# gpt2repro.eval is eval/ beside this package in a checkout, and lies inside it in an installed wheel.
if not (Path(__file__).parent / "eval").is_dir():
    __path__.append(str(Path(__file__).parents[1]))
