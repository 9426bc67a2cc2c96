"""Result files of the commands. They replace results of an earlier evaluation and no other file."""

import json
from collections.abc import Sequence
from pathlib import Path

from gpt2repro.command import UsageError
from gpt2repro.files import write_whole
from gpt2repro.hub.figures import weights_sha256

# No other file of a model, a run or a task has one of them.
RESULT_KEYS = {"acc", "bits_per_byte", "core", "correct", "lm_eval", "prediction"}


def check_output(output: str | None, *, items: bool = False) -> None:
    """Refuse an --output that would replace anything but earlier results; called before the work.

    Raises:
        UsageError: the file, or with `items` the .jsonl beside it, holds something else, such as the command's input.
    """
    if not output:
        return
    if Path(output).suffix != ".json":  # a.x and a.y would have the same items, a.jsonl
        raise UsageError(f"--output is {output}: give a name that ends in .json; items go to the .jsonl beside it")
    for path in (Path(output), Path(output).with_suffix(".jsonl"))[: 1 + items]:
        replaceable = path.is_file() and (path.stat().st_size == 0 or _holds_results(path))
        if path.exists() and not replaceable:
            raise UsageError(f"{path} exists and holds no results of an evaluation: give --output another name")


def _holds_results(path: Path) -> bool:
    """Whether `write_results` wrote the file."""
    with open(path, "rb") as file:
        text = file.readline() if path.suffix == ".jsonl" else file.read()
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and bool(value.keys() & RESULT_KEYS)


def measured(model, name: str) -> dict[str, str | None]:
    """What the figures were measured of: the model's name, and the hash of its weights or the revision of the Hub."""
    if Path(name).is_dir():
        return {"model": name, "weights_sha256": weights_sha256(name)}
    return {"model": name, "revision": getattr(model.config, "_commit_hash", None)}


def output_file(path: str | Path) -> Path:
    """The path of a file that a command is about to write; makes its folder and prints its name."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    print(f"writing {path}")
    return Path(path)


def picture_file(path: str | Path) -> Path:
    """`output_file` for a picture or a page; UsageError where it would replace anything else."""
    begins = (b"\x89PNG", b"%PDF", b"<?xml", b"<!doctype html>")
    if Path(path).is_file() and not Path(path).read_bytes().startswith(begins):
        raise UsageError(f"{path} exists and is no picture or page: give another name")
    return output_file(path)


def write_results(output: str, figures: dict, *, items: Sequence[dict] = ()) -> None:
    """The figures as a JSON object for people, and the items, if any, as a line each in the .jsonl beside it."""
    if items:
        lines = "".join(json.dumps(item) + "\n" for item in items)
        write_whole(output_file(Path(output).with_suffix(".jsonl")), lines)
    write_whole(output_file(output), json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
