"""Recipe YAML and command line -> `Recipe`.

    train_accelerate.py --recipe recipes/demo.yaml --learning_rate 1e-3 --files a.txt b.txt

A recipe sets, the command line overrides, an unknown name fails with the nearest known one. Numbers may be written
as people write them (YAML reads `6e-4` as a string). Dashes and underscores are the same in flags.
"""

import argparse
import difflib
import math
import types
import typing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from gpt2repro.training.arguments import Recipe


class UsageError(ValueError):
    """A recipe or command line that cannot be read; the script ends with exit code 2."""


def parse_recipe(argv: list[str], *, default: str | Path) -> Recipe:
    """The recipe that a command line asks for; without arguments the one in `default`.

    Raises:
        UsageError: unknown fields, values of the wrong type, an unreadable recipe; one line each, all together.
    """
    parser = _parser(default)
    known, unknown = parser.parse_known_args(argv)
    given = vars(known)
    path = given.pop("recipe", None) or (default if not argv else None)
    problems = [_unknown(word, "flag") for word in unknown if word.startswith("--")]
    if unknown and not problems:
        problems = [f"{' '.join(unknown)!r} stands alone on the command line: flags are --field value"]
    settings = (_read_yaml(Path(path), problems) if path else {}) | given
    values = {}
    hints = typing.get_type_hints(Recipe)
    for name, value in settings.items():
        try:
            values[name] = _convert(value, hints[name])
        except (TypeError, ValueError):
            problems.append(f"{name} is {value!r}: expected {_spoken(hints[name])}")
    if problems:
        raise UsageError("\n".join(problems))
    return Recipe(**values)


def write_recipe(recipe: Recipe, path: Path) -> None:
    """The resolved recipe as YAML: running it again runs the same."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(recipe).items()}
    path.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _parser(default: str | Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Pre-train a GPT-2. Every field of a recipe is also a flag.",
    )
    parser.add_argument("--recipe", metavar="YAML", help=f"the recipe to start from (without any argument: {default})")
    for item in fields(Recipe):
        default_value = item.default[0] if isinstance(item.default, tuple) and item.default else item.default
        shown = f"; one of {', '.join(item.metadata['choices'])}" if item.metadata["choices"] else ""
        shown += "" if default_value in (None, ()) else f" (default: {default_value})"
        names = sorted({f"--{item.name}", f"--{item.name.replace('_', '-')}"}, reverse=True)
        parser.add_argument(
            *names,
            dest=item.name,
            metavar="VALUE",
            nargs="*" if isinstance(item.default, tuple) else None,
            help=(item.metadata["help"] + shown).replace("%", "%%"),
        )
    return parser


def _read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        nearby = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) or "none"
        raise UsageError(f"there is no recipe at {path}: recipes beside it: {nearby}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"the recipe {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(
            f"the recipe {path} holds {type(content).__name__}: expected lines of the form `field: value`"
        )
    known = {item.name for item in fields(Recipe)}
    problems += [_unknown(str(key), f"recipe key in {path}") for key in content if key not in known]
    return {key: value for key, value in content.items() if key in known}


def _unknown(word: str, what: str) -> str:
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    near = difflib.get_close_matches(name, [item.name for item in fields(Recipe)], n=1)
    return f"unknown {what}: {word}" + (f"; did you mean {near[0]}?" if near else "; --help lists the fields")


def _convert(value: Any, hint: Any) -> Any:
    """`value` (a YAML scalar or a command-line string) as the type `hint`; TypeError or ValueError if it is none."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None or (value == "null" and type(None) in options):
        if type(None) in options:
            return None
        raise TypeError
    target = next(option for option in options if option is not type(None))
    if typing.get_origin(target) is tuple:
        return tuple(str(item) for item in (value if isinstance(value, (list, tuple)) else [value]))
    if isinstance(value, (list, dict)):
        raise TypeError
    if target is str:
        return str(value).lower() if isinstance(value, bool) else str(value)  # compile: true is a word
    if target is bool:
        if str(value).lower() not in ("true", "false"):
            raise ValueError
        return str(value).lower() == "true"
    number = float(str(value).replace("_", "").replace(",", ""))
    if isinstance(value, bool) or not math.isfinite(number) or (target is int and not number.is_integer()):
        raise ValueError
    return target(number)


def _spoken(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join(names.get(option, "a list of texts") for option in options)
