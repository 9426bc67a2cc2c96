"""A run's mirror: a copy of every checkpoint, from which the same command resumes on a machine with an empty disk.

`mirror: s3://BUCKET/FOLDER` in a recipe names one; `hub_state: true` means the branch `state` of `hub_repo_id`. A
mirror holds the steps that `output_dir` keeps (`keep_last`, `keep_every`). store.py has the layout.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from gpt2repro.command import say
from gpt2repro.files import seal
from gpt2repro.hub import store
from gpt2repro.hub.figures import read_json
from gpt2repro.hub.push import BackgroundPush, link_or_copy, step_of
from gpt2repro.hub.store import WRITER, Store
from gpt2repro.recipe import Recipe
from gpt2repro.run import checkpoints
from gpt2repro.run.folder import RECORD, RunFolder, differences, record_of

FORMAT_VERSION = 1


class Damaged(ValueError):
    """A state that is not as it was written."""


def restore(folder: RunFolder, recipe: Recipe, *, dataset: dict[str, Any]) -> Recipe:
    """Copy the newest state of the mirror into the run's folder, if that has none as new; says so.

    A damaged state is passed over with a warning. With another `resume` than auto nothing is copied. Returns the
    recipe, with the steps of the run that is there.

    Raises:
        ValueError: the mirror cannot be read, or holds another run, or nothing that is undamaged.
    """
    mirror = Store(recipe.mirror_url() or "")
    newest = folder.find_checkpoint("auto")
    steps = mirror.steps()
    for step in reversed(steps):
        try:
            record = _read_record(mirror, step)
            _refuse_another_run(json.loads(record["files"][RECORD]), mirror.url, folder, recipe, dataset)
            if recipe.resume == "auto" and (not newest or step > step_of(newest)):
                _download(mirror, step, record, folder)
                there = f"its newest checkpoint was step {step_of(newest)}" if newest else "it had no checkpoint"
                say(f"{folder.path}: step {step} is copied from {mirror.url}; {there}")
            return folder.with_its_steps(recipe)
        except Damaged as error:
            say(f"warning: step {step} in {mirror.url} is damaged, the state before it is tried: {error}")
    if steps and not newest:
        raise ValueError(f"mirror {mirror.url} holds only damaged states: give another mirror to begin again")
    return recipe


def _read_record(mirror: Store, step: int) -> dict[str, Any]:
    """A state's completion record."""
    text = mirror.read(f"step-{step:08d}.json") or b""
    try:
        record = json.loads(text)
        intact = record.pop("sha256") == seal(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"its record cannot be read ({error})") from None
    if not intact:
        raise Damaged("the sha256 of its record is not the recorded one")
    if record["format"] != FORMAT_VERSION:
        raise ValueError(f"{mirror.url} is of format {record['format']}, this code reads {FORMAT_VERSION}")
    return record


def _refuse_another_run(
    found: dict[str, Any], url: str, folder: RunFolder, recipe: Recipe, dataset: dict[str, Any]
) -> None:
    local = folder.record()
    problems = differences(found, recipe, dataset)
    if local and local["id"] != found["id"]:
        problems = [f"{found['id']}, and {folder.path} holds {local['id']}"]
    if not local and recipe.resume != "auto":
        problems = [f"resume is {recipe.resume}, which begins a new one"]
    if problems:
        raise ValueError(
            f"mirror {url} holds another run ({'; '.join(problems)}): give another mirror, or the same values"
        )


def _download(mirror: Store, step: int, record: dict[str, Any], folder: RunFolder) -> None:
    """Bring the checkpoint of `step`, and the best one before it where the run keeps that and the mirror has it."""
    folder.lock()
    found, wanted = {}, {step, record["best"]} & {*mirror.steps()}
    for each in wanted - {step_of(path) for path in folder.path.glob("step-*")}:
        aside = folder.path / f".step-{each:08d}.mirror.tmp"
        shutil.rmtree(aside, ignore_errors=True)  # of a kill during a download
        aside.mkdir()
        mirror.download(f"step-{each:08d}", aside)
        try:
            checkpoints.verify_checkpoint(aside)
        except ValueError as error:
            shutil.rmtree(aside)
            problem = str(error).rpartition(": ")[0]  # without the advice, which is for a run's folder
            if each == step:
                raise Damaged(problem) from None
            say(f"warning: step {each} in {mirror.url}, the best one, is damaged and left out: {problem}")
            continue
        found[each] = aside
    folder.take_in(found, record["files"], best=record["best"])


class MirrorPush(BackgroundPush):
    """Copies every checkpoint to the mirror; one that is not there is copied at the next start.

    Raises:
        ValueError: the mirror cannot be written.
    """

    kind = "mirror"
    waits_after_a_stop = True  # the machine may vanish with the run

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        super().__init__(run_dir=folder.path)
        mirror = Store(recipe.mirror_url() or "")
        self._url, self._recipe = mirror.url, recipe
        self._writer = json.dumps(folder.start, indent=2).encode()
        mirror.claim(self._writer)
        self._steps = mirror.steps()

    def is_due(self, step: int) -> bool:
        return True

    def missed(self, step: int, rows: list[dict[str, Any]], *, ended: bool) -> bool:
        return step not in self._steps or max(self._steps) > step  # a run that went back; its next copy deletes those

    def gather(self, checkpoint: Path, folder: Path) -> None:
        copies = folder / f"step-{step_of(checkpoint):08d}"
        copies.mkdir(parents=True)
        for name in (*read_json(checkpoint / checkpoints.RECORD)["files"], checkpoints.RECORD):
            link_or_copy(checkpoint / name, copies / name)
        files, best = record_of(checkpoint.parent), checkpoints.best_step(checkpoint.parent)
        record: dict[str, Any] = {"format": FORMAT_VERSION, "best": best, "files": files}
        (folder / f"{copies.name}.json").write_text(json.dumps(record | {"sha256": seal(record)}), encoding="utf-8")
        (folder / WRITER).write_bytes(self._writer)

    def command(self, folder: Path, step: int) -> list[str]:
        self._steps = [*(before for before in self._steps if before < step), step]  # a run may have gone back
        last, every = self._recipe.keep_last, self._recipe.keep_every
        keep = checkpoints.kept(folder.parents[1], self._steps, keep_last=last, keep_every=every)
        return [store.__name__, str(folder), self._url, *map(str, sorted(keep))]
