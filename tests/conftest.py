"""What all tests share: the folder of real data, where there is one."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with gpt2_tokenizer, tinyshakespeare, eval and corpus; the test is skipped where there is none."""
    shared = Path(os.environ.get("GPT2REPRO_SHARED", ROOT.parent / "shared")) / "data"
    if not shared.is_dir():
        pytest.skip(f"no real data at {shared}: set GPT2REPRO_SHARED to the folder that holds data/")
    return shared
