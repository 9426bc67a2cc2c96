"""A checkpoint on the Hub, with a model card that says what it is, how it was trained and what was measured of it.

    python -m gpt2repro.hub.publish runs/demo/latest --repo-id me/gpt2-demo --dry-run demo-repo     # look first
    python -m gpt2repro.hub.publish runs/demo/latest --repo-id me/gpt2-demo                         # private
    python -m gpt2repro.hub.publish runs/demo/latest --repo-id me/gpt2-demo-stock --stock --public

Uploaded are weights, configuration, tokenizer, our two Python files, README.md and the run's curves.png; never the
optimizer's state. With `--stock` it is the conversion to stock GPT-2, which loads without our code. All of it comes in
one commit; after a failure the same command goes on. `hub_repo_id` in a recipe does the same from inside a run.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any

from huggingface_hub.utils import validate_repo_id

from gpt2repro import command
from gpt2repro.hub import upload as upload_script
from gpt2repro.hub.card import model_card
from gpt2repro.hub.convert import convert, load_as_gpt2repro
from gpt2repro.hub.upload import upload, writable_repo
from gpt2repro.run.checkpoints import OPTIMIZER, RECORD, verify_checkpoint
from gpt2repro.run.folder import RECORD as RUN_RECORD

PUSH_WAIT_SECONDS = 600  # that the end of a run waits for its last checkpoint: 500 MB at 1 MB/s and then some
UPLOADED = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "configuration_gpt2repro.py", "modeling_gpt2repro.py",
)  # fmt: skip


def publish(
    checkpoint: str | Path, repo_id: str, *, stock: bool = False, private: bool = True, dry_run: Path | None = None
) -> str:
    """Put a checkpoint up, or with `dry_run` make that folder as it would be; returns where it is then.

    Raises:
        ValueError: no complete checkpoint, no network, no token, no right, or an upload that broke off.
    """
    checkpoint = Path(checkpoint).resolve()
    validate_repo_id(repo_id)
    check_complete(checkpoint)
    if dry_run is None:
        repo_id = writable_repo(repo_id, private=private)
    elif dry_run.exists():
        raise ValueError(f"{dry_run} exists: give a new folder, or delete it")
    else:
        dry_run.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".publish-", dir=dry_run.parent if dry_run else None) as aside:
        folder = Path(aside) / "repository"
        place = shutil.copyfile if dry_run else link_or_copy
        stage(checkpoint, folder, repo_id=repo_id, stock=stock, place=place)
        if dry_run is not None:
            os.replace(folder, dry_run)
            return str(dry_run)
        return upload(folder, repo_id, message=f"Upload {checkpoint.name}")


def check_complete(checkpoint: Path) -> None:
    """Read a checkpoint of a run against its record's hashes; another folder must load whole, tokenizer included.

    Raises:
        ValueError: something is missing, damaged, or of another architecture.
    """
    if (checkpoint / RECORD).is_file():
        verify_checkpoint(checkpoint)
        return
    if not checkpoint.is_dir():
        raise ValueError(f"there is no folder {checkpoint}: give a checkpoint, e.g. runs/NAME/latest")
    if (checkpoint / OPTIMIZER).exists():
        raise ValueError(f"{checkpoint} has {OPTIMIZER} but no {RECORD}: its saving was not finished; give another")
    for wanted in ("config.json", "tokenizer.json", "model*.safetensors"):
        if not list(checkpoint.glob(wanted)):
            raise ValueError(f"{checkpoint} holds no {wanted}: give a complete checkpoint (gpt2repro.hub.convert)")
    load_as_gpt2repro(checkpoint, dtype="auto")


def link_or_copy(file: Path, target: Path) -> None:
    """A link costs neither time nor room, but another disk, or one without links, takes a copy."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def stage(
    checkpoint: Path, folder: Path, *, repo_id: str, stock: bool = False,
    place: Callable[[Path, Path], object] = link_or_copy,
) -> None:  # fmt: skip
    """Make `folder` what is to be uploaded; `place` puts a file there."""
    files = sorted({file for pattern in UPLOADED for file in checkpoint.glob(pattern)})
    if stock:
        convert(checkpoint, folder, to="gpt2")
        files = []
    folder.mkdir(exist_ok=True)
    if (checkpoint.parent / RUN_RECORD).is_file():
        files += checkpoint.parent.glob("curves.png")
    for file in files:
        place(file, folder / file.name)
    model_card(checkpoint, folder, repo_id=repo_id).save(folder / "README.md")


class BackgroundPush:
    """Pushes checkpoints of a run while it goes on; whatever happens to a push, the run does not stop or wait.

    A push is a process of its own: a thread would hold the interpreter at the run's end for as long as a dead
    connection does. One runs at a time; of checkpoints that come meanwhile the newest waits, the others are left out.
    The files are linked aside first, so that the run may delete the checkpoint. Used on the main process only.
    """

    def __init__(self, repo_id: str, *, run_dir: Path) -> None:
        # A missing token or right is an error now, not in an hour.
        self.repo_id = writable_repo(repo_id)
        self._run_dir = run_dir
        # what it says, what it pushes, and since when
        self._running: tuple[subprocess.Popen, IO[str], Path, float] | None = None
        self._waiting: Path | None = None
        self._rows: list[dict[str, Any]] = []
        for leftover in run_dir.glob(".push-*"):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)

    def submit(self, checkpoint: Path) -> None:
        """Push a checkpoint that was just saved, as soon as the push before it has ended."""
        staged = self._run_dir / f".push-{checkpoint.name}"
        try:
            shutil.rmtree(staged, ignore_errors=True)
            stage(checkpoint, staged, repo_id=self.repo_id)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._report(staged, error=f"{type(error).__name__}: {error}")
            return
        if self._waiting:
            shutil.rmtree(self._waiting, ignore_errors=True)
        self._waiting = staged
        self._start_next()

    def finished(self) -> list[dict[str, Any]]:
        """A row for each push that has ended since the last call: checkpoint_step, seconds, url or error."""
        if self._running and self._running[0].poll() is not None:
            self._end()
            self._start_next()
        rows, self._rows = self._rows, []
        return rows

    def wait(self, *, stopped: bool, give_up: Callable[[], bool] = lambda: False) -> list[dict[str, Any]]:
        """End the pushes of a run: at once where it was `stopped`, else after PUSH_WAIT_SECONDS or `give_up()`."""
        deadline, rows = time.monotonic() + (0 if stopped else PUSH_WAIT_SECONDS), self.finished()
        while self._running and time.monotonic() < deadline and not give_up():
            time.sleep(0.1)
            rows += self.finished()
        if self._running:
            self._running[0].kill()
            self._end("not finished when the run ended")
        if self._waiting:
            self._report(self._waiting, error="not begun when the run ended")
        return rows + self.finished()

    def _start_next(self) -> None:
        if self._running or not self._waiting:
            return
        staged, self._waiting = self._waiting, None
        # -P: the folder of that file is no place to import from. A session of its own: Ctrl-C is the run's.
        message = f"Upload {staged.name.removeprefix('.push-')}"
        command = [sys.executable, "-P", upload_script.__file__, str(staged), self.repo_id, message]
        environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        try:
            # A file: a pipe that nobody reads would stop a client that complains for long.
            said = TemporaryFile("w+", encoding="utf-8", errors="replace")
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
                env=environment,
            )  # fmt: skip
        except OSError as error:
            self._report(staged, error=str(error))
        else:
            self._running = process, said, staged, time.perf_counter()

    def _end(self, problem: str | None = None) -> None:
        assert self._running
        process, said, staged, began = self._running
        self._running = None
        process.wait()
        with said:
            said.seek(0)
            last = (said.read().strip().splitlines() or ["it said nothing"])[-1].removeprefix("error: ")
        outcome = {"url": last} if process.returncode == 0 else {"error": problem or last}
        self._report(staged, seconds=time.perf_counter() - began, **outcome)

    def _report(self, staged: Path, **outcome: Any) -> None:
        self._rows.append({"checkpoint_step": int(staged.name.rpartition("-")[2]), **outcome})
        shutil.rmtree(staged, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Publish a checkpoint on the Hub with a model card.")
    parser.add_argument("checkpoint", help="folder of a checkpoint, e.g. runs/demo/latest")
    parser.add_argument("--repo-id", required=True, help="OWNER/NAME, or NAME for your own account")
    parser.add_argument("--dry-run", type=Path, metavar="DIR", help="make the folder that would be uploaded, and stop")
    parser.add_argument("--stock", action="store_true", help="publish the conversion to stock GPT-2")
    parser.add_argument("--public", action="store_true", help="a new repository is private otherwise")
    args = parser.parse_args(argv)
    options = {"stock": args.stock, "private": not args.public, "dry_run": args.dry_run}
    return command.run(lambda: print(publish(args.checkpoint, args.repo_id, **options)), errors_only=True)


if __name__ == "__main__":
    sys.exit(main())
