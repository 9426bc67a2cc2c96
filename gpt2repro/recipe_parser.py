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
PROMPT = "sample_prompt"  # the field that is a text of a person's: it may be empty, and ~ in it is no folder
# As people write numbers. Python also reads 1__0 as 10, ５ as 5, and 1.000 as the whole number 1.
WHOLE = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+|\d{1,3}(_\d{3})+|(\d+\.?\d*|\.\d+)[eE][+]?\d+)", re.ASCII)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class _Texts(yaml.BaseLoader):
    """Every scalar is a text, which the field's type converts: YAML itself reads 6e-4 as a text, `no` as false, 12:30
    as 750 and 010 as 8. A key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        found = super().construct_mapping(node, deep=deep)
        if len(found) < len(node.value):
            names = [key.value for key, _ in node.value]
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"{twice} stands there twice", node.start_mark)
        return found


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
    text, path = given.pop("text", None), given.pop("recipe", None if argv else default)
    problems = [_unknown(word, "flag") for word in unknown if word.startswith("--")]
    if unknown and not problems:
        problems = [f"{' '.join(unknown)!r} stands alone on the command line: flags are --field value"]
    chosen: own_text.Words = {}
    if text is not None:
        if also := given.keys() & {"source", "files"} | ({"recipe"} if path is not None else set()):
            raise UsageError(f"--text is a recipe and a source by itself: leave --{' and --'.join(sorted(also))} out")
        path, chosen = OWN_TEXT_RECIPE, own_text.fields_for(text)
        if "max_steps" in given:
            del chosen["max_minutes"]
    settings = {} if path is None else _read_yaml(Path(path), problems)
    if "dataset_dir" in {**chosen, **given}:  # other folders: the recipe's weights are not theirs
        settings.pop("dataset_weights", None)
    settings |= chosen | given
    values, hints = {}, typing.get_type_hints(Recipe)
    for name, value in settings.items():
        try:
            if name in given and value == "" and name != PROMPT:  # "$CHECKPOINT" that is not set
                raise ValueError
            converted = _convert(value, hints[name])
            values[name] = value if name == PROMPT else converted
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
    text_help = "train on these files of text: chooses the rest"
    parser.add_argument("--text", metavar="FILE", nargs="+", action=_Once, help=text_help)
    for item in fields(Recipe):
        default_value = item.default[0] if isinstance(item.default, tuple) and item.default else item.default
        shown = f"; one of {', '.join(CHOICES[item.name])}" if item.name in CHOICES else ""
        shown += "" if default_value in (None, ()) else f" (default: {default_value})"
        names = sorted({f"--{item.name}", f"--{item.name.replace('_', '-')}"}, reverse=True)
        kind: dict[str, Any] = {"nargs": "*", "action": _Once} if isinstance(item.default, tuple) else {}
        help_line = (item.metadata["help"] + shown).replace("%", "%%")
        parser.add_argument(*names, dest=item.name, metavar="VALUE", help=help_line, **kind)
    return parser


class _Once(argparse.Action):
    """A flag with a list of values: given twice, the first list would be lost without a word."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if hasattr(namespace, self.dest):
            parser.error(f"{option_string} is given twice: give all values after one of them")
        setattr(namespace, self.dest, values)


def _read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Texts)
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
    content = {key: value for key, value in content.items() if key in known}
    entries = content.get("dataset_dir")
    if isinstance(entries, list) and any(isinstance(entry, dict) for entry in entries):
        return content | _mixture(entries, content, problems)
    return content


def _mixture(entries: list[Any], content: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The fields that a list of `{dir: FOLDER, weight: NUMBER}` stands for."""
    form = "give every folder of a mixture as {dir: FOLDER, weight: NUMBER}"
    wrong = [entry for entry in entries if not isinstance(entry, dict) or entry.keys() != {"dir", "weight"}]
    if "dataset_weights" in content:
        problems.append("dataset_weights stands beside a dataset_dir that has weights: leave one of them out")
    if wrong:
        problems.append(f"dataset_dir has {wrong[0]!r}: {form}")
        return {"dataset_dir": []}
    folders, weights = ([entry[key] for entry in entries] for key in ("dir", "weight"))
    return {"dataset_dir": folders, "dataset_weights": weights}


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
        kind = typing.get_args(target)[0]
        return tuple(os.path.expanduser(item) if kind is str else _convert(item, kind) for item in items)
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
    if not (WHOLE if target is int else NUMBER).fullmatch(value):
        raise ValueError
    exact = Decimal(value.replace(",", ""))
    if target is int:
        if exact != exact.to_integral_value() or abs(exact) > 2**63:
            raise ValueError
        return int(exact)
    number = float(value)
    if not math.isfinite(number) or (exact and not number):  # 1e999, 1e-999
        raise ValueError
    return number


def _spoken(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    items = "numbers" if hint == tuple[float, ...] else "texts"
    return " or ".join(names.get(option, f"a list of {items}") for option in options)
