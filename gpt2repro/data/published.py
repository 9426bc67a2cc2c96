"""Prepared datasets on the Hub: hf://datasets/OWNER/NAME[@REVISION] where a folder could stand.

    folder = local_folder("hf://datasets/me/shakespeare")

The files are those of the prepared folder, in the cache of huggingface_hub; dataset.json's hashes verify them. A whole
dataset is downloaded before its first use, because the first step already reads windows from all over it.
"""

import os
from functools import partial
from pathlib import Path

ADDRESS = "hf://datasets/"


def is_published(name: str | Path) -> bool:
    return str(name).startswith("hf://")


def local_folder(name: str | Path) -> Path:
    """The folder of a dataset: `name` itself, or where the Hub's files are, after the download of what is missing.

    Raises ValueError for a wrong address, and for a download that does not succeed.
    """
    if not is_published(name):
        return Path(os.path.expanduser(name))
    from huggingface_hub import snapshot_download  # --help need not wait for it

    from gpt2repro.hub.upload import hub_is_reachable, one_line

    repo_id, _, revision = str(name).removeprefix(ADDRESS).partition("@")
    if not str(name).startswith(ADDRESS) or repo_id.count("/") != 1:
        raise ValueError(f"{name} is no dataset's address: give {ADDRESS}OWNER/NAME or {ADDRESS}OWNER/NAME@REVISION")
    offline = not hub_is_reachable()  # then what was downloaded before is used
    try:
        download = partial(snapshot_download, repo_id, repo_type="dataset", revision=revision or None)
        return Path(download(local_files_only=offline))
    except Exception as error:  # of the HTTP library, of xet, of the Hub, of the disk
        command = f"hf download {repo_id} --repo-type dataset{f' --revision {revision}' if revision else ''}"
        raise ValueError(f"{name} cannot be downloaded ({one_line(error)}); try {command}") from error
