"""Files that are written whole or not at all, their hashes, links, and locks between processes."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import IO, Any


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(record: dict[str, Any]) -> str:
    """The sha256 of a record's content, which a JSON file keeps beside it: a flipped bit is noticed."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def sync(path: str | Path) -> None:
    """Wait until the disk has a file's content, or the names in a folder."""
    if sys.platform == "win32" and os.path.isdir(path):  # it syncs no folder, and a file that is open for writing
        return
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a hidden file, sync and rename it: after a kill or a power cut `path` is the old file or the new one."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def link_to(target: Path, link: Path) -> None:
    """Make `link` mean `target` beside it; where the system refuses links (Windows), a file with its name does so."""
    aside = link.with_name(f".{link.name}.tmp")
    aside.unlink(missing_ok=True)
    try:
        aside.symlink_to(target.name)
    except OSError:
        aside.write_text(target.name, encoding="utf-8")
    os.replace(aside, link)
    sync(link.parent)


def linked(link: Path) -> Path:
    """The folder that `link_to` made `link` mean; any other path as it is."""
    if link.is_file() and link.stat().st_size < 256 and (target := link.parent / link.read_text().strip()).is_dir():
        return target
    return link


def take_lock(path: Path) -> IO[str]:
    """Lock a file until the returned one is closed or the process ends, however it ends.

    A disk without file locks (some network shares) gives none: that is a warning.

    Raises:
        BlockingIOError: another process has the lock.
    """
    file = open(path, "a")
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # the second on Windows
        file.close()
        raise BlockingIOError(*error.args) from None
    except OSError as error:
        why = f"the disk of {path.parent} has no file locks ({error.strerror})"
        print(f"warning: {why}: let only one process write there", file=sys.stderr)
    return file
