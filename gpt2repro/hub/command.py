"""How a command of this folder runs and ends."""

import sys
from collections.abc import Callable

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging


def run_quietly(work: Callable[[], str]) -> int:
    """Do `work` without a word of the libraries and print what it returns; the command's exit code.

    An error that a person can mend becomes one line on standard error and exit code 1.
    """
    hub_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        print(work())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
