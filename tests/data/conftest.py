"""Real text that every Python carries, as files and as small prepared datasets."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from gpt2repro.data.prepare import prepare
from gpt2repro.data.shards import UNFINISHED, ShardWriter


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file of a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="session")
def folder_digests() -> Callable[[Path], dict[str, str]]:
    return digests


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """The paragraphs of Python's language reference, 2,000 and more of them."""
    from pydoc_data.topics import topics

    paragraphs = (part for name in sorted(topics) for part in topics[name].split("\n\n"))
    return list(dict.fromkeys(part for part in paragraphs if part.strip()))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The corpus with a tokenizer of its own, in shards of 10,000 tokens."""
    out = tmp_path_factory.mktemp("prepared") / "corpus"
    return prepare(
        source="files", files=[str(corpus)], tokenizer="train:1024", out=out, shard_tokens=10_000, val_fraction=0.05
    )


@pytest.fixture
def write_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Writes given ids as a dataset in the own format, without a tokenizer."""

    def write(
        train: np.ndarray, val: Sequence[int] = (), *, vocab_size: int = 50257, shard_tokens: int = 1000
    ) -> Path:
        folder = tmp_path / f"dataset-{len(list(tmp_path.iterdir()))}"
        (folder / UNFINISHED).mkdir(parents=True)
        splits = {}
        for name, ids in ("train", train), ("val", val):
            writer = ShardWriter(folder, name, vocab_size=vocab_size, eot_id=0, shard_tokens=shard_tokens)
            writer.write(np.asarray(ids, dtype=np.uint32))
            writer.finish_shard()
            splits[name] = writer.record
        info = {
            "format_version": 1,
            "tokenizer_sha256": "none",
            "vocab_size": vocab_size,
            "eot_id": 0,
            "splits": splits,
        }
        (folder / "dataset.json").write_text(json.dumps(info))
        return folder

    return write
