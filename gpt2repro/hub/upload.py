"""The way to the Hub: is it there, may we write, put a folder up.

    python gpt2repro/hub/upload.py FOLDER OWNER/NAME MESSAGE

is what a run starts in the background, so this file imports nothing but the Hub's client.
"""

import sys
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.utils import http_backoff

# Files of ours that another checkpoint may not have: left in the repository, `from_pretrained` might take them.
REPLACED = ["*.safetensors", "*.safetensors.index.json", "*_gpt2repro.py", "curves.png"]


def hub_is_reachable() -> bool:
    """Whether the Hub answers: in seconds, where the library's own requests retry for three quarters of a minute.

    After an answer of trouble (5xx) it is asked once more. HF_HUB_ETAG_TIMEOUT is how long it may take (10 seconds);
    with HF_HUB_OFFLINE=1 it is not asked. What is in the local cache loads all the same, with `local_files_only=True`.
    """
    try:
        http_backoff(
            "HEAD", constants.ENDPOINT, max_retries=1, retry_on_exceptions=(),
            retry_on_status_codes=(500, 502, 503, 504), timeout=constants.HF_HUB_ETAG_TIMEOUT, follow_redirects=False,
        )  # fmt: skip
    except Exception:  # of the HTTP library, which is another one from release to release, or of the offline mode
        return False
    return True


def writable_repo(repo_id: str, *, private: bool = True) -> str:
    """Make the model repository where there is none (an existing one keeps its visibility); returns OWNER/NAME.

    Raises:
        ValueError: no network, no token, a name that is none, or no right to write there.
    """
    if not hub_is_reachable():
        raise ValueError(
            f"the Hub does not answer at {constants.ENDPOINT}: go where there is a network to write to {repo_id!r}"
        )
    if not get_token():
        raise ValueError(f"there is no token for the Hub: run `hf auth login` or set HF_TOKEN to write to {repo_id!r}")
    try:
        repo_id = HfApi().create_repo(repo_id, private=private, exist_ok=True).repo_id
        HfApi().auth_check(repo_id, write=True)
    except Exception as error:
        raise ValueError(f"the Hub does not let us write to {repo_id!r} ({one_line(error)})") from error
    return repo_id


def upload(folder: str | Path, repo_id: str, *, message: str) -> str:
    """Put a folder's files up in one commit; returns its address. Run again after a failure, it goes on.

    What arrived before is not sent again, and nothing shows in the repository before the commit.

    Raises:
        ValueError: it did not work, and why.
    """
    try:
        commit = HfApi().upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns=REPLACED
        )
    except Exception as error:  # of the HTTP library, of xet, of the Hub
        raise ValueError(
            f"the upload to {repo_id} broke off ({one_line(error)}): publish again, and it goes on where it was"
        ) from error
    return commit.commit_url


def one_line(error: BaseException) -> str:
    """An error and what it came from, on a line."""
    texts = dict.fromkeys(" ".join(str(each).split()) for each in (error, error.__cause__) if each and str(each))
    return "; ".join(texts)[:300] or type(error).__name__


if __name__ == "__main__":
    try:
        print(upload(sys.argv[1], sys.argv[2], message=sys.argv[3]))
    except ValueError as failure:
        sys.exit(f"error: {failure}")
