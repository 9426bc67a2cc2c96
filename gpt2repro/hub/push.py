"""Upload checkpoints of a run to the Hub while it trains."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2repro.hub import upload
from gpt2repro.hub.card import model_card
from gpt2repro.hub.publish import gather
from gpt2repro.recipe import Recipe

AGAIN = "run the same command again to push it"
PUSH_WAIT_SECONDS = 600  # how long the end of a run waits for its last checkpoint: 500 MB at 1 MB/s, and a margin


class BackgroundPush:
    """Pushes checkpoints one at a time; whatever happens to a push, the run neither stops nor waits.

    A push is a process: a thread (huggingface_hub's run_as_future) would keep the interpreter from ending for as long
    as a dead connection lasts. Of the checkpoints that are submitted during a push, the newest is pushed next and the
    others are left out. The files are linked into a hidden folder first, so the run may delete the checkpoint. A push
    ends with its run, also when that is killed, and the next start makes up for it (`catch_up`). So a push never comes
    after one of a newer checkpoint. Used on the main process only.

    Raises:
        ValueError: no network, no token, or no right to write to the repository.
    """

    def __init__(self, recipe: Recipe, *, run_dir: Path) -> None:
        assert recipe.hub_repo_id
        self.repo_id = upload.writable_repo(recipe.hub_repo_id)
        self._every, self._last = recipe.hub_every, recipe.max_steps
        self._run_dir = run_dir
        self._process: subprocess.Popen | None = None
        self._folder: Path | None = None  # of the process
        self._began = 0.0
        self._waiting: Path | None = None
        self._rows: list[dict[str, Any]] = []

    def is_due(self, step: int) -> bool:
        """Whether the checkpoint of a step is to be pushed: every `hub_every` steps, and the last."""
        return step == self._last or bool(self._every and step % self._every == 0)

    def catch_up(self, checkpoint: Path | None, *, step: int, rows: list[dict[str, Any]]) -> None:
        """Push the checkpoint that the run resumes from, if one was due up to it that did not reach the Hub.

        `rows` are those of metrics.jsonl up to its step. A checkpoint of another run is not pushed.
        """
        if checkpoint and checkpoint.parent == self._run_dir.resolve():
            here = [row for row in rows if row["kind"] == "push" and f"/{self.repo_id}/" in row.get("url", "")]
            pushed = max((row["checkpoint_step"] for row in here), default=0)
            if any(self.is_due(due) for due in range(pushed + 1, step + 1)):
                self.submit(checkpoint)

    def submit(self, checkpoint: Path) -> None:
        """Push a checkpoint that was just saved, as soon as the running push has ended."""
        folder = checkpoint.parent / f".push-{checkpoint.name}"
        shutil.rmtree(folder, ignore_errors=True)  # of a killed run: its files may be links to another checkpoint's
        try:
            gather(checkpoint, folder / "files", copy=link_or_copy)
            card = model_card(checkpoint, folder / "files", repo_id=self.repo_id)
            card.save(folder / "files" / "README.md")
        except Exception as error:  # must not stop the run
            self._report(folder, error=f"{type(error).__name__}: {error}")
            return
        self._waiting = folder
        needed = {each.name for each in (self._folder, self._waiting) if each}
        for other in checkpoint.parent.glob(".push-*"):  # an older one that waited, or what a killed run left
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
        """End all pushes and return their rows: at once if the run was `stopped`, else after PUSH_WAIT_SECONDS.

        It also ends them when `give_up()` becomes true.
        """
        deadline = time.monotonic() + (0 if stopped else PUSH_WAIT_SECONDS)
        rows = self.finished()
        while self._process and time.monotonic() < deadline and not give_up():
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
        # -P: the folder of that script is not a place to import from. New session: Ctrl-C is for the run.
        message = f"Upload {folder.name.removeprefix('.push-')}"
        command = [sys.executable, "-P", upload.__file__, str(folder / "files"), self.repo_id, message]
        environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
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
        self._rows.append({"checkpoint_step": int(folder.name.rpartition("-")[2]), **outcome})
        shutil.rmtree(folder, ignore_errors=True)


def link_or_copy(file: Path, target: Path) -> None:
    """A hard link costs neither time nor space; another disk, or one without links, gets a copy."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
