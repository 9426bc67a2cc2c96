"""Every command of the project: how it starts, explains an error, and ends.

    gpt2repro --help              # the commands of an installed package; gpt2repro train … is train_accelerate.py
    gpt2repro eval hellaswag …    # = python -m eval.hellaswag … in a checkout

Exit codes: 0 done, 1 an error that was explained, 2 wrong usage, 75 stopped by a signal after saving, 130 interrupted
before anything was saved, 141 the reader of standard output is gone.
"""

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

DONE, EXPLAINED, USAGE, STOPPED_BY_SIGNAL, INTERRUPTED, NO_READER = 0, 1, 2, 75, 130, 141
# The name of each command and its module, which has a main().
COMMANDS = {
    "train": "train_accelerate",
    "prepare": "gpt2repro.data.prepare",
    "eval core": "gpt2repro.eval.core",
    "eval hellaswag": "gpt2repro.eval.hellaswag",
    "eval multiple-choice": "gpt2repro.eval.multiple_choice",
    "eval validation": "gpt2repro.eval.validation",
    "eval lm-harness": "gpt2repro.eval.lm_harness",
    "sample": "gpt2repro.eval.sample",
    "convert": "gpt2repro.hub.convert",
    "gguf": "gpt2repro.hub.gguf",
    "publish": "gpt2repro.hub.publish",
    "doctor": "gpt2repro.tools.doctor",
    "report": "gpt2repro.tools.report",
    "scaling": "gpt2repro.tools.scaling",
    "sweep": "gpt2repro.tools.sweep",
    "inspect": "gpt2repro.tools.inspect",
    "app": "gpt2repro.tools.app",
    "verify": "gpt2repro.tools.verify",
}


class UsageError(ValueError):
    """A command line or recipe that cannot be read; the command ends with exit code 2."""


class Parser(argparse.ArgumentParser):
    """The flags of a command. An empty value, as of a shell's variable that is not set, is wrong usage: it would mean
    none without a word. `~` is the home folder after `=` too, where no shell says so. A prompt is as it is given.
    """

    def __init__(self, description: str | None, **settings: Any) -> None:
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=style, allow_abbrev=False, **settings)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            values = value if isinstance(value, list) else [value]
            if name == "prompt":
                continue
            if "" in values:
                self.error(f"--{name.replace('_', '-')} is empty: give a value, or leave it out")
            home = [type(each)(os.path.expanduser(each)) if isinstance(each, str | Path) else each for each in values]
            setattr(found, name, home if isinstance(value, list) else home[0])
        return found, rest


def run(work: Callable[[], int | None], *, errors_only: bool = False) -> int:
    """Do `work` and return the exit code.

    ValueError, OSError, ImportError and MemoryError are errors that a person can fix: a line on standard error for
    each line of their text. Any other exception is a fault of the program and keeps its traceback. `errors_only`
    silences the libraries' own warnings.
    """
    quiet_libraries(errors_only=errors_only)
    # Closed by the shell (>&-): Python then has None in its place, and the next file that is opened its number.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a text that the terminal cannot show ends no command
    try:
        code = work() or DONE
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        discard_output()
        return NO_READER
    except UsageError as error:
        if not int(os.environ.get("RANK", 0)):  # every process reads the same command line
            explain(error)
        return USAGE
    except (ValueError, OSError, ImportError, MemoryError) as error:
        explain(error)
        try:
            sys.stdout.flush()
        except OSError:  # a full disk: what is left would fail again at the exit
            discard_output()
        return EXPLAINED
    except KeyboardInterrupt:
        explain(InterruptedError("interrupted; run the same command again"))
        return INTERRUPTED


def say(text: str) -> None:
    """A line of a run on standard output. A run outlives its terminal."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):  # closed, or the disk of a log is full
        discard_output()


def discard_output() -> None:
    """Let standard output go nowhere, once nobody reads it: the interpreter's flush at the exit would fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: BaseException) -> None:
    """A line on standard error for each thing that is wrong; of several processes each says which it is."""
    rank = int(os.environ.get("RANK", 0))
    for line in (str(error) or type(error).__name__).splitlines():
        print(f"error on process {rank}: {line}" if rank else f"error: {line}", file=sys.stderr)


def starting(module: str) -> bool:
    """Whether this process was started to run the command in `module`, which asks at its top with its `__name__`."""
    return module in ("__main__", COMMANDS.get(sys.argv[0].removeprefix("gpt2repro ")))


def parse_early(parse: Callable[[], object]) -> None:
    """Answer `--help` and wrong usage at once, before the command's module imports libraries that take seconds.

    `parse` reads the words of this process; the command's main() does so again.
    """
    explain_interrupts()

    def work() -> None:
        parse()

    if code := run(work):
        sys.exit(code)


def explain_interrupts() -> None:
    """Let Ctrl-C before `run`, while the libraries are imported, be a line instead of a traceback."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            explain(InterruptedError("interrupted; run the same command again"))
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def quiet_libraries(*, errors_only: bool) -> None:
    """No progress bars in a log, where each turn of a bar is a line; with `errors_only` no advice of the libraries."""
    for library in ("transformers", "huggingface_hub"):
        if logging := sys.modules.get(f"{library}.utils.logging"):
            if errors_only:
                logging.set_verbosity_error()
            if library == "transformers" and (errors_only or not sys.stderr.isatty()):
                logging.disable_progress_bar()


def main(argv: list[str] | None = None) -> int:
    """The command `gpt2repro`: find the module of the first words and hand it the rest."""
    words = sys.argv[1:] if argv is None else argv
    for count in (2, 1):
        if (name := " ".join(words[:count])) in COMMANDS:
            sys.argv = [f"gpt2repro {name}", *words[count:]]
            return importlib.import_module(COMMANDS[name]).main()

    def work() -> None:
        if words and words[0] not in ("-h", "--help"):
            raise UsageError(f"there is no command {' '.join(words[:2])!r}: gpt2repro --help lists them")
        print("usage: gpt2repro COMMAND [options]; --help after a command explains it\n\ncommands:")
        print("\n".join(f"  {name:22} python -m {module}" for name, module in COMMANDS.items()))

    return run(work)
