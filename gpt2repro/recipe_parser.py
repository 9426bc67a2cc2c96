"""How YAML and flags make a recipe, and how one is written.

    recipe = parse_recipe(["--recipe", "recipes/demo.yaml", "--learning_rate", "1e-3"], default="recipes/demo.yaml")

YAML sets a field, a flag overrides it, an unknown name fails with the nearest known one. The parsing is ours and not
HfArgumentParser's, because all errors of a recipe are reported together and `--help` must not wait for an import.
"""

import argparse
import difflib
import math
import os
import re
import sys
import types
import typing
from dataclasses import asdict, fields
from decimal import Decimal, InvalidOperation
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from gpt2repro import own_text
from gpt2repro.command import UsageError, say
from gpt2repro.recipe import CHOICES, Recipe

RECIPES = files("gpt2repro.recipes")  # of the checkout or the wheel
DEFAULT_RECIPE, OWN_TEXT_RECIPE = (Path(str(RECIPES / name)) for name in ("demo.yaml", "shakespeare.yaml"))


def read_recipe(argv: list[str] | None = None, *, announce: bool = False) -> Recipe:
    """The recipe that this process is to train, checked; from its own command line, if none is given.

    `announce` prints which recipe it is, where the command line has flags but no recipe.
    """
    words = sys.argv[1:] if argv is None else argv
    recipe = parse_recipe(words, default=DEFAULT_RECIPE)
    recipe.check(world_size=int(os.environ.get("WORLD_SIZE", 1)))
    flags = {word.split("=")[0] for word in words}
    if not announce or int(os.environ.get("RANK", 0)):
        return recipe
    if "--text" in flags:
        say(own_text.explanation(recipe))
    elif words and "--recipe" not in flags:
        steps = f"model {recipe.model}, {recipe.max_steps:,} steps of {recipe.global_batch_tokens:,} tokens"
        say(f"no --recipe: what no flag sets is as for GPT-2 124M on 10B tokens. This run: {steps}")
        say(f"the demo is --recipe {DEFAULT_RECIPE}")
    return recipe


def parse_recipe(argv: list[str], *, default: str | Path) -> Recipe:
    """The recipe that a command line asks for; without arguments the one in `default`.

    Raises:
        UsageError: unknown fields, values of the wrong type, an unreadable recipe; one line each, all together.
    """
    known, unknown = _parser(default).parse_known_args(argv)
    given = vars(known)
    text, path = given.pop("text", None), given.pop("recipe", None) or (default if not argv else None)
    problems = [_unknown(word, "flag") for word in unknown if word.startswith("--")]
    if unknown and not problems:
        problems = [f"{' '.join(unknown)!r} stands alone on the command line: flags are --field value"]
    chosen: own_text.Words = {}
    if text is not None:
        if also := given.keys() & {"source", "files"} | ({"recipe"} if path else set()):
            raise UsageError(f"--text is a recipe and a source by itself: leave --{' and --'.join(sorted(also))} out")
        path, chosen = OWN_TEXT_RECIPE, own_text.fields_for(text)
        if "max_steps" in given:
            del chosen["max_minutes"]
    settings = (_read_yaml(Path(path), problems) if path else {}) | chosen | given
    values, hints = {}, typing.get_type_hints(Recipe)
    for name, value in settings.items():
        try:
            values[name] = _convert(value, hints[name])
        except (TypeError, ValueError, InvalidOperation):
            problems.append(f"{name} is {value!r}: expected {_spoken(hints[name])}")
    if problems:
        raise UsageError("\n".join(problems))
    if values.get("init_from") and not values.keys() & {"model", "n_layer", "n_head", "n_embd", "n_positions"}:
        values["model"] = "init_from"
    return Recipe(**values)


def write_recipe(recipe: Recipe, path: Path) -> None:
    """The resolved recipe as YAML: running it again runs the same."""
    # To go back to a checkpoint is asked for once, not at every later start.
    settings = {**asdict(recipe), "resume": "auto"}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    path.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _parser(default: str | Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Pre-train a GPT-2. Every field of a recipe is also a flag.",
    )  # fmt: skip
    parser.add_argument("--recipe", metavar="YAML", help=f"the recipe to start from (without any argument: {default})")
    parser.add_argument("--text", metavar="FILE", nargs="+", help="train on these files of text: chooses the rest")
    for item in fields(Recipe):
        default_value = item.default[0] if isinstance(item.default, tuple) and item.default else item.default
        shown = f"; one of {', '.join(CHOICES[item.name])}" if item.name in CHOICES else ""
        shown += "" if default_value in (None, ()) else f" (default: {default_value})"
        names = sorted({f"--{item.name}", f"--{item.name.replace('_', '-')}"}, reverse=True)
        nargs = "*" if isinstance(item.default, tuple) else None
        help_line = (item.metadata["help"] + shown).replace("%", "%%")
        parser.add_argument(*names, dest=item.name, metavar="VALUE", nargs=nargs, help=help_line)
    return parser


def _read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        # Every scalar is a text, which the field's type converts: YAML itself reads 6e-4 as a text, `no` as false,
        # 12:30 as 750 and 010 as 8.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except FileNotFoundError:
        nearby = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) or "none"
        raise UsageError(f"there is no recipe at {path}: recipes beside it: {nearby}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"the recipe {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UsageError(f"the recipe {path} holds {kind}: expected lines of the form `field: value`")
    known = {item.name for item in fields(Recipe)}
    problems += [_unknown(str(key), f"recipe key in {path}") for key in content if key not in known]
    return {key: value for key, value in content.items() if key in known}


def _unknown(word: str, what: str) -> str:
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    near = difflib.get_close_matches(name, [item.name for item in fields(Recipe)], n=1)
    return f"unknown {what}: {word}" + (f"; did you mean {near[0]}?" if near else "; --help lists the fields")


def _convert(value: str | list[str], hint: Any) -> Any:
    """A text, or a list of texts, as the type `hint`; an exception if it is none."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    target = next(option for option in options if option is not type(None))
    if typing.get_origin(target) is tuple:
        items = [] if value in ("", "null", "~") else value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) and item for item in items):
            raise ValueError
        return tuple(os.path.expanduser(item) for item in items)
    if not isinstance(value, str):
        raise TypeError
    if value in ("", "null", "~") and type(None) in options:
        return None
    if target is str:
        if value in ("null", "~"):
            raise ValueError
        return os.path.expanduser(value)
    if target is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError
        return value.lower() == "true"
    if target is int:  # 524,288 and 1e9 are whole numbers; 0,5 and 1,00 are none
        whole = Decimal(value.replace(",", "") if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+", value) else value)
        if not whole.is_finite() or whole != whole.to_integral_value() or abs(whole) > 2**63:
            raise ValueError
        return int(whole)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _spoken(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join(names.get(option, "a list of texts") for option in options)
