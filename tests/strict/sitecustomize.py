"""Turns our own use of what a library deprecates into an error, in pytest and in every process that a test starts.

Python imports a module of this name when it starts, if its folder is on PYTHONPATH; tests/conftest.py puts it there.

pytest's filters see only the module that a warning names. Libraries often name their own module there, although the
call came from ours. So the stack decides: a deprecation is ours if one of our files is at most `DIRECT` frames above
the warning, and the frames between belong to one package. What a library does deeper inside passes.
"""

import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KINDS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
DIRECT = 3  # the deprecated function, a decorator around it, a function that writes the message
WRAPPERS = {"contextlib", "functools", "typing_extensions", "warnings"}  # decorators of any package
TRAVELLERS = {"modeling_gpt2repro.py", "configuration_gpt2repro.py"}  # their copies in checkpoints are ours, too


def is_ours(file: str) -> bool:
    path = Path(file)
    return path.name in TRAVELLERS or (path.is_relative_to(ROOT) and "site-packages" not in path.parts)


def our_caller(frame) -> str | None:
    """FILE:LINE of ours that called the function which warns in `frame`; None if that was somebody else's call."""
    packages = set()
    for _ in range(DIRECT + 1):
        if frame is None:
            break
        if is_ours(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}" if len(packages - WRAPPERS) <= 1 else None
        packages.add(frame.f_globals.get("__name__", "").split(".")[0])
        frame = frame.f_back
    return None


def strict(warn):
    """`warnings.warn`, but a deprecation of what we call ourselves is raised."""

    def strict_warn(message, category=None, stacklevel=1, source=None, **settings):
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        if issubclass(kind, KINDS) and (place := our_caller(sys._getframe(1))):
            raise kind(f"{place} uses what is deprecated: {message}")
        warn(message, category, stacklevel + 1, source, **settings)

    return strict_warn


if warnings.warn.__name__ != "strict_warn":  # a second import changes nothing
    warnings.warn = strict(warnings.warn)
