"""The client of the Hub: is it reachable, may we write, upload a folder.

    python -m gpt2repro.hub.upload FOLDER OWNER/NAME MESSAGE

is what a run starts in the background, so this file imports nothing but the Hub's library.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import http_backoff

TRIES = 5
# Files that an older upload may have and this one not: `from_pretrained` might load them. *.npy: shards.
REPLACED = ["*.safetensors", "*.safetensors.index.json", "*_gpt2repro.py", "curves.png", "*.npy"]


def hub_is_reachable() -> bool:
    """Whether the Hub answers, found out in seconds; the library's own requests retry for three quarters of a minute.

    After a server error (5xx) it is asked once more. HF_HUB_ETAG_TIMEOUT is how long an answer may take (10 seconds).
    With HF_HUB_OFFLINE=1 it is not asked.
    """
    try:
        http_backoff(
            "HEAD", constants.ENDPOINT, max_retries=1, retry_on_exceptions=(),
            retry_on_status_codes=(500, 502, 503, 504), timeout=constants.HF_HUB_ETAG_TIMEOUT, follow_redirects=False,
        )
    except Exception:  # of the HTTP library, which differs between releases, or of the offline mode
        return False
    return True


def writable_repo(repo_id: str, *, private: bool = True, repo_type: str = "model") -> str:
    """Make the repository if there is none (an existing one keeps its visibility); returns OWNER/NAME.

    Raises:
        ValueError: no network, no token, an invalid name, or no right to write there.
    """
    if not hub_is_reachable():
        raise ValueError(f"the Hub does not answer at {constants.ENDPOINT}: {repo_id!r} cannot be written without it")
    if not get_token():
        raise ValueError(f"there is no token for the Hub: run `hf auth login` or set HF_TOKEN to write to {repo_id!r}")
    try:
        repo_id = HfApi().create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type).repo_id
        HfApi().auth_check(repo_id, write=True, repo_type=repo_type)
    except Exception as error:
        raise ValueError(f"the Hub does not let us write to {repo_id!r} ({one_line(error)})") from error
    return repo_id


def upload(folder: str | Path, repo_id: str, *, message: str, repo_type: str = "model") -> str:
    """Upload the files of a folder in one commit; returns its address.

    A second try after a failure sends only what is missing, and nothing is visible before the commit.

    Raises:
        ValueError: it did not work, and why.
    """
    try:
        commit = commit_onto_head(repo_id, lambda head: HfApi().upload_folder(
            repo_id=repo_id, repo_type=repo_type, folder_path=folder, commit_message=message,
            delete_patterns=REPLACED, parent_commit=head,
        ), repo_type=repo_type)  # fmt: skip
        return commit.commit_url
    except Exception as error:  # of the HTTP library, of xet, of the Hub
        raise ValueError(
            f"the upload to {repo_id} failed ({one_line(error)}): publish again, only what is missing is sent"
        ) from error


def commit_onto_head(
    repo_id: str, commit: Callable[[str | None], CommitInfo], *, branch: str | None = None, repo_type: str = "model"
) -> CommitInfo:
    """`commit(head)` makes a commit that names the head as its parent; again, if another commit came first.

    So a commit that was on its way when its run was killed comes before those of the next start of the run or not at
    all.
    """
    for tries in range(1, TRIES + 1):
        try:
            return commit(HfApi().repo_info(repo_id, revision=branch, repo_type=repo_type).sha)
        except HfHubHTTPError as error:
            if error.response.status_code != 412 or tries == TRIES:
                raise
    raise AssertionError


def in_background(work: Callable[[], str]) -> None:
    """Print what `work` returns. The process ends when its standard input is closed: with the run, however that ends.

    A scheduler sends the signals that stop a run to this process too. The run decides how long it waits.
    """
    for name in ("SIGTERM", "SIGINT", "SIGUSR2"):
        if number := getattr(signal, name, None):  # Windows has only some of them
            signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    try:
        print(work())
    except ValueError as failure:
        sys.exit(f"error: {failure}")


def _end_with_the_run() -> None:
    sys.stdin.read()
    os._exit(1)


def one_line(error: BaseException) -> str:
    """An error and its cause on one line."""
    texts = [" ".join(str(each).split()) for each in (error, error.__cause__) if each]
    return "; ".join(filter(None, dict.fromkeys(texts)))[:300] or type(error).__name__


if __name__ == "__main__":
    in_background(lambda: upload(sys.argv[1], sys.argv[2], message=sys.argv[3]))
