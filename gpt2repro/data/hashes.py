"""The sha256 of large files, computed once: a file that has not changed since is not read again.

The hashes are remembered in ~/.cache/gpt2repro/sha256.json ($XDG_CACHE_HOME) by a file's path, size, inode and times
of change. Without that file, or where it cannot be written, every file is read.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpt2repro.files import file_sha256, write_whole

READERS = 4
REMEMBERED_AT_ONCE = 16  # files: an interruption loses the work of so many


def known_sha256(paths: Iterable[Path]) -> list[str]:
    """The sha256 of every file, in order; read where it is not known."""
    remembered = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "gpt2repro", "sha256.json")
    known: dict[str, tuple[list[int], str]] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        known = {name: (state, sha256) for name, (state, sha256) in json.loads(remembered.read_text("utf-8")).items()}
    names = [os.path.realpath(path) for path in paths]
    states = {name: _state(name) for name in names}
    new = [name for name, state in states.items() if name not in known or known[name][0] != state]
    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(new), REMEMBERED_AT_ONCE):
            part = new[first : first + REMEMBERED_AT_ONCE]
            read = zip(part, pool.map(file_sha256, part), strict=True)
            known |= {name: (states[name], sha256) for name, sha256 in read}
            with contextlib.suppress(OSError):
                remembered.parent.mkdir(parents=True, exist_ok=True)
                write_whole(remembered, json.dumps(known))
    return [known[name][1] for name in names]


def _state(name: str) -> list[int]:
    """What changes when a file does, taken before it is read."""
    status = os.stat(name)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
