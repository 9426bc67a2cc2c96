"""The states of a run outside its machine: on a branch of the Hub, or at any other URL that fsspec knows.

    python -m gpt2repro.hub.store FOLDER URL [STEP …]

is what a run starts in the background (mirror.py): it copies the state in FOLDER to URL and deletes there all others
but those of the STEPs. It imports nothing of a model.

    hf://OWNER/NAME@BRANCH, s3://BUCKET/FOLDER, gs://…, file:///…
      step-00005000/        a checkpoint, file by file as in the run's folder
      step-00005000.json    its completion record: the run's record at that step, with a hash of itself
      writer.json           the start of a run that may write here

The completion record is written last and deleted first; a state without one does not exist. On the Hub a state is one
commit, which names the one that it follows. The newest start is the writer, an older one that still runs is refused.
"""

import contextlib
import re
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import fsspec
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from gpt2repro.hub.upload import commit_onto_head, hub_is_reachable, in_background, one_line, writable_repo
from gpt2repro.recipe import HUB_BRANCH

WRITER = "writer.json"
STATE = re.compile(r"step-(\d{8})(\.json)?")


class StoreError(ValueError):
    """What a store refused, with its address and the reason. Every method of one may raise it."""


class Store:
    """The place with this URL."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        hub = HUB_BRANCH.fullmatch(self.url)
        self._repo_id, self._branch = hub.groups() if hub else ("", "")
        self._is_local = url.startswith(("file:", "local:"))
        if hub and not hub_is_reachable():
            raise StoreError(f"the Hub does not answer: {self.url} cannot be opened without it")
        fresh = {"skip_instance_cache": True, "use_listings_cache": False}
        # A local folder must be made for its files. Other stores have none.
        options = {"auto_mkdir": True} if self._is_local else {}
        with self._explained("opened"):
            self._fs, self._root = fsspec.url_to_fs(self.url, **fresh, **options)

    def steps(self) -> list[int]:
        """The steps of the complete states, oldest first."""
        return sorted(int(match[1]) for match in self._names() if match[2])

    def read(self, name: str) -> bytes | None:
        """The content of a small file, or None where there is none."""
        with self._explained("read"):
            self._fs.invalidate_cache()
            try:
                return self._fs.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None

    def download(self, name: str, folder: Path) -> None:
        """Copy the files of the checkpoint `name` into `folder`."""
        with self._explained("read"):
            files = self._fs.ls(f"{self._root}/{name}", detail=False)
            self._fs.get(files, [str(folder / file.rpartition("/")[2]) for file in files])

    def claim(self, writer: bytes) -> None:
        """Make the start of a run that `writer` describes the only one that may write; make what must be there."""
        if self._repo_id:
            writable_repo(self._repo_id)
        with self._explained("written"):
            if self._repo_id:
                HfApi().create_branch(self._repo_id, branch=self._branch, exist_ok=True)
                self._commit("Start", lambda: [CommitOperationAdd(WRITER, writer)])
                return
            if self._is_local and not self._fs.exists(self._root):
                self._fs.mkdir(self._root, create_parents=False)  # without the parent the disk is not mounted
            self._fs.pipe_file(f"{self._root}/{WRITER}", writer)

    def put(self, folder: Path, keep: Collection[int]) -> str:
        """Copy the state in `folder` and delete those of other steps than `keep`; returns its address."""
        (record,) = folder.glob("step-*.json")
        step = int(record.stem.removeprefix("step-"))
        files = {f"{record.stem}/{file.name}": file for file in (folder / record.stem).iterdir()}
        writer = (folder / WRITER).read_bytes()
        with self._explained("written"):
            if self._repo_id:
                files[record.name] = record
                self._commit(f"State of {record.stem}", lambda: self._operations(files, writer, {*keep, step}))
                # Older commits would keep what was deleted, and the Hub would count it.
                HfApi().super_squash_history(self._repo_id, branch=self._branch)
                return f"{self.url}/{record.stem}"
            self._refuse_another_writer(writer)
            complete, there = set(self.steps()), {int(match[1]) for match in self._names()}
            self._delete(there - complete)  # what a kill or a full disk left
            self._delete({step} & complete)
            self._fs.put([str(file) for file in files.values()], [f"{self._root}/{name}" for name in files])
            self._fs.put_file(str(record), f"{self._root}/{record.name}")
            self._delete(complete - {*keep, step})
        return f"{self.url}/{record.stem}"

    def _operations(self, files: dict[str, Path], writer: bytes, keep: set[int]) -> list[Any]:
        """What a commit on the Hub does, as long as nobody else has committed."""
        self._refuse_another_writer(writer)
        old = [match for match in self._names() if int(match[1]) not in keep]
        return [
            *(CommitOperationAdd(name, file) for name, file in files.items()),
            *(CommitOperationDelete(match[0], is_folder=not match[2]) for match in old),
        ]

    def _commit(self, message: str, operations: Callable[[], list[Any]]) -> None:
        commit_onto_head(self._repo_id, lambda head: HfApi().create_commit(
            self._repo_id, operations(), commit_message=message, revision=self._branch, parent_commit=head,
        ), branch=self._branch)  # fmt: skip

    def _delete(self, steps: set[int]) -> None:
        for step in sorted(steps):
            for name in (f"step-{step:08d}.json", f"step-{step:08d}"):
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm(f"{self._root}/{name}", recursive=True)

    def _names(self) -> list[re.Match[str]]:
        """The names of checkpoints and completion records."""
        with self._explained("read"):
            self._fs.invalidate_cache()
            try:
                paths = self._fs.ls(self._root, detail=False)
            except FileNotFoundError:  # nothing was ever written
                return []
        return list(filter(None, (STATE.fullmatch(path.rstrip("/").rpartition("/")[2]) for path in paths)))

    def _refuse_another_writer(self, writer: bytes) -> None:
        if (found := self.read(WRITER)) != writer:
            other = " ".join((found or b"no start").decode(errors="replace").split())
            raise StoreError(f"{self.url} has another writer by now ({other[:200]}): this start copies nothing there")

    @contextlib.contextmanager
    def _explained(self, done: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # of the store's library, of the network, of the disk
            raise StoreError(f"{self.url} cannot be {done} ({one_line(error)})") from error


if __name__ == "__main__":
    in_background(lambda: Store(sys.argv[2]).put(Path(sys.argv[1]), {int(step) for step in sys.argv[3:]}))
