"""Copy checkpoints of a run to another place while it trains: to the Hub, or to its mirror (mirror.py)."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2repro.command import say
from gpt2repro.hub import upload
from gpt2repro.hub.card import model_card
from gpt2repro.hub.publish import gather
from gpt2repro.recipe import Recipe

AGAIN = "run the same command again to push it"
PUSH_WAIT_SECONDS = 600  # how long the end of a run waits for its last checkpoint: 500 MB at 1 MB/s, and a margin


class BackgroundPush:
    """Pushes checkpoints one at a time; whatever happens to a push, the run neither stops nor waits.

    What is pushed, and where to, is the kind's: HubPush, MirrorPush.

    A push is a process: a thread (huggingface_hub's run_as_future) would keep the interpreter from ending for as long
    as a dead connection lasts. Of the checkpoints that are submitted during a push, the newest is pushed next and the
    others are left out. The files are linked into a hidden folder first, so the run may delete the checkpoint. A push
    ends with its run, also when that is killed, and the next start makes up for it (`catch_up`). So a push never comes
    after one of a newer checkpoint. Used on the main process only.
    """

    kind: str  # of its rows in metrics.jsonl
    waits_after_a_stop: bool

    def __init__(self, *, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._process: subprocess.Popen | None = None
        self._folder: Path | None = None  # of the process
        self._began = 0.0
        self._waiting: Path | None = None
        self._rows: list[dict[str, Any]] = []

    def is_due(self, step: int) -> bool:
        """Whether the checkpoint of a step is to be pushed."""
        raise NotImplementedError

    def missed(self, step: int, rows: list[dict[str, Any]], *, ended: bool) -> bool:
        """Whether a checkpoint up to `step` was due and did not arrive; `rows` are those of metrics.jsonl up to it.

        ended: the run ended early at `step`, so that one was due too.
        """
        raise NotImplementedError

    def gather(self, checkpoint: Path, folder: Path) -> None:
        """Fill `folder`, which is new, with what is to be pushed."""
        raise NotImplementedError

    def command(self, folder: Path, step: int) -> list[str]:
        """The module that pushes `folder`, and its arguments."""
        raise NotImplementedError

    def catch_up(
        self, checkpoint: Path | None, *, step: int, rows: list[dict[str, Any]], ended: bool = False
    ) -> None:
        """Push the checkpoint that the run resumes from, if it missed one; not a checkpoint of another run."""
        if checkpoint and checkpoint.parent == self._run_dir.resolve() and self.missed(step, rows, ended=ended):
            self.submit(checkpoint)

    def submit(self, checkpoint: Path) -> None:
        """Push a checkpoint that was just saved, as soon as the running push has ended."""
        folder = checkpoint.parent / f".{self.kind}-{checkpoint.name}"
        shutil.rmtree(folder, ignore_errors=True)  # of a killed run: its files may be links to another checkpoint's
        try:
            self.gather(checkpoint, folder / "files")
        except Exception as error:  # must not stop the run
            self._report(folder, error=f"{type(error).__name__}: {error}")
            return
        self._waiting = folder
        needed = {each.name for each in (self._folder, self._waiting) if each}
        for other in checkpoint.parent.glob(f".{self.kind}-*"):  # an older one that waited, or what a killed run left
            if other.name not in needed:
                shutil.rmtree(other, ignore_errors=True)
        self._start_next()

    def finished(self) -> list[dict[str, Any]]:
        """A row for each push that has ended since the last call: checkpoint_step, seconds, url or error."""
        if self._process and self._process.poll() is not None:
            self._end()
            self._start_next()
        rows, self._rows = self._rows, []
        return rows

    def wait(self, *, stopped: bool, give_up: Callable[[], bool] = lambda: False) -> list[dict[str, Any]]:
        """End all pushes and return their rows, after PUSH_WAIT_SECONDS at most.

        A kind that does not wait after a stop ends them at once if the run was `stopped`, or when `give_up()` holds.
        """
        deadline = time.monotonic() + (0 if stopped and not self.waits_after_a_stop else PUSH_WAIT_SECONDS)
        rows = self.finished()
        if self._process and stopped and self.waits_after_a_stop:
            say(f"the {self.kind} is not finished: the run waits for it, another signal ends it at once")
        while self._process and time.monotonic() < deadline and (self.waits_after_a_stop or not give_up()):
            time.sleep(0.1)
            rows += self.finished()
        if self._process:
            self._process.kill()
            self._end(f"not finished when the run ended, {AGAIN}")
        if self._waiting:
            self._report(self._waiting, error=f"not begun when the run ended, {AGAIN}")
        return rows + self.finished()

    def _start_next(self) -> None:
        if self._process or not self._waiting:
            return
        folder, self._waiting = self._waiting, None
        # -P: the working folder is no place to import from. New session: Ctrl-C is for the run.
        command = [sys.executable, "-P", "-m", *self.command(folder / "files", step_of(folder))]
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        try:
            with open(folder / "output", "w") as output:
                # Standard input is never written to; it closes when this process ends.
                streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": output, "stderr": output}
                self._process = subprocess.Popen(command, **streams, env=environment, start_new_session=True)
            self._folder, self._began = folder, time.perf_counter()
        except OSError as error:
            self._report(folder, error=str(error))

    def _end(self, problem: str | None = None) -> None:
        assert self._process and self._process.stdin and self._folder
        failed = self._process.wait() != 0
        self._process.stdin.close()
        lines = (self._folder / "output").read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line), "no output").removeprefix("error: ")
        outcome = {"error": problem or last} if failed else {"url": last}
        self._report(self._folder, seconds=time.perf_counter() - self._began, **outcome)
        self._process = None

    def _report(self, folder: Path, **outcome: Any) -> None:
        self._rows.append({"checkpoint_step": step_of(folder), **outcome})
        shutil.rmtree(folder, ignore_errors=True)


class HubPush(BackgroundPush):
    """Uploads weights and a model card every `hub_every` steps, and those of the last step.

    Raises:
        ValueError: no network, no token, or no right to write to the repository.
    """

    kind = "push"
    waits_after_a_stop = False

    def __init__(self, recipe: Recipe, *, run_dir: Path) -> None:
        super().__init__(run_dir=run_dir)
        assert recipe.hub_repo_id
        self.repo_id = upload.writable_repo(recipe.hub_repo_id)
        self._every, self._last = recipe.hub_every, recipe.max_steps

    def is_due(self, step: int) -> bool:
        return step == self._last or bool(self._every and step % self._every == 0)

    def missed(self, step: int, rows: list[dict[str, Any]], *, ended: bool) -> bool:
        here = [row for row in rows if row["kind"] == self.kind and f"/{self.repo_id}/" in row.get("url", "")]
        pushed = max((row["checkpoint_step"] for row in here), default=0)
        return any(self.is_due(due) for due in range(pushed + 1, step + 1)) or (ended and pushed < step)

    def gather(self, checkpoint: Path, folder: Path) -> None:
        gather(checkpoint, folder, copy=link_or_copy)
        model_card(checkpoint, folder, repo_id=self.repo_id).save(folder / "README.md")

    def command(self, folder: Path, step: int) -> list[str]:
        return [upload.__name__, str(folder), self.repo_id, f"Upload step-{step:08d}"]


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint, or of the folder of its push."""
    return int(folder.name.rpartition("-")[2])


def link_or_copy(file: Path, target: Path) -> None:
    """A hard link costs neither time nor space; another disk, or one without links, gets a copy."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
