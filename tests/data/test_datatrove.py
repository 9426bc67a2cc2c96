"""What datatrove tokenises: the same ids as our own preparation, and the same losses in training."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2repro.data.prepare import prepare
from gpt2repro.data.shards import open_dataset
from tests.conftest import ROOT

pytest.importorskip("datatrove", reason='datatrove is not installed: pip install -c constraints.txt -e ".[datatrove]"')
PIPELINE = ROOT / "docs" / "launchers" / "tokenise_datatrove.py"


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """The corpus in two JSONL files, with a document that spells the token."""
    folder = tmp_path_factory.mktemp("halves")
    documents = ["it spells <|endoftext|> here", *texts]
    for name, part in ("a", documents[:1000]), ("b", documents[1000:]):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part), "utf-8")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, halves: Path, dataset_folder: Path) -> tuple[Path, Path]:
    """The same documents by our preparation and by the pipeline, in two tasks."""
    folder = tmp_path_factory.mktemp("pairs")
    ours = prepare(
        source="files", files=[str(halves / "*.jsonl")], tokenizer=str(dataset_folder), out=folder / "ours",
        val_fraction=0.01,
    )  # fmt: skip
    command = [sys.executable, PIPELINE, halves, folder / "theirs", "--jsonl", "--tasks", "2"]
    done = subprocess.run(
        [*command, "--tokenizer", dataset_folder / "tokenizer.json"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return ours, folder / "theirs"


def test_the_pipeline_gives_the_ids_of_our_own_preparation(pairs: tuple[Path, Path]) -> None:
    ours, theirs = (open_dataset(folder) for folder in pairs)
    for split in "train", "val":
        one, other = ours.split(split), theirs.split(split)
        assert one.tokens == other.tokens
        assert np.array_equal(one.read(0, one.tokens), other.read(0, other.tokens))
    assert len(theirs.shards["train"]) == 2


def test_training_on_them_gives_the_same_losses_bit_for_bit(pairs: tuple[Path, Path], train_script, tmp_path) -> None:
    losses = []
    for folder in pairs:
        out = tmp_path / folder.name
        train_script(out, dataset_dir=folder)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([(row["kind"], row["loss"]) for row in rows if row["kind"] in ("train", "val")])
    assert losses[0] == losses[1] and len(losses[0]) > 8


def test_datatroves_own_order_is_our_stream_from_its_second_token_on(
    texts: list[str], dataset_folder: Path, tmp_path: Path
) -> None:
    """<|endoftext|> after every document and not before it; merged to several files."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger

    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:400]), "utf-8")
    parts, merged, tokenizer = str(tmp_path / "parts"), tmp_path / "train", str(dataset_folder / "tokenizer.json")
    step = DocumentTokenizer(parts, tokenizer, eos_token="<|endoftext|>", shuffle_documents=False)
    LocalPipelineExecutor([JsonlReader(str(documents)), step], logging_dir=str(tmp_path / "logs")).run()
    options = {"max_tokens_per_file": 10_000, "shuffle": False, "progress": False}
    DocumentTokenizerMerger(parts, str(merged), "all", **options).run()
    ours = prepare(
        source="files", files=[str(documents / "a.jsonl")], tokenizer=str(dataset_folder), out=tmp_path / "ours",
        val_fraction=0.0,
    )  # fmt: skip
    one, other = open_dataset(ours).split("train"), open_dataset(merged).split("train")
    assert one.tokens == other.tokens and len(other.shards) > 1
    assert np.array_equal(one.read(1, one.tokens), other.read(0, other.tokens))
    other.shards[0].path.unlink()
    with pytest.raises(ValueError, match="but its shards have"):
        open_dataset(merged)
