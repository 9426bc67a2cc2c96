"""Encoding: the token ids of `tokenizers`, for every way to cut a document and for both encoders."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from gpt2repro.data.encoding import (
    HARD_TEXT,
    PIECE_BYTES,
    check_fast,
    cut_document,
    exact_encoder,
    fast_encoder,
    train_bpe,
)
from gpt2repro.data.shards import load_tokenizer

ALPHABET = [
    "a", "Z", "7", ".", "'s", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2028", "é", "東", "🙂",
]


@pytest.fixture(scope="module")
def tokenizer_file(shared_dir: Path) -> Path:
    return shared_dir / "gpt2_tokenizer" / "tokenizer.json"


def hard_document(seed: int, length: int) -> str:
    """Text with every kind of white space and newline in every neighbourhood, of `length` pieces."""
    chance = random.Random(seed)
    return "".join(chance.choices(ALPHABET, k=length))


def test_encoding_is_that_of_transformers(dataset_folder: Path, texts: list[str]) -> None:
    encode, reference = exact_encoder(dataset_folder / "tokenizer.json"), load_tokenizer(str(dataset_folder))
    for text in (*texts[:300], hard_document(0, 5000)):
        assert encode(text).tolist() == reference.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("spread", ["newlines", "no newlines", "no white space"])
def test_cutting_a_document_changes_no_id(dataset_folder: Path, spread: str) -> None:
    encode = exact_encoder(dataset_folder / "tokenizer.json")
    text = hard_document(1, 500_000)
    if spread != "newlines":
        text = text.replace("\n", "").replace("\r", "")
    if spread == "no white space":
        text = "".join(text.split())
    pieces = list(cut_document(text.encode(), encode))
    assert b"".join(pieces) == text.encode()
    if spread != "no white space":
        assert len(pieces) > 2 and max(map(len, pieces)) < 2 * PIECE_BYTES
    joined = np.concatenate([encode(piece.decode()) for piece in pieces])
    assert np.array_equal(joined, encode(text))


@pytest.mark.parametrize("line", ["весна пришла и ушла", "春天來了又走了"])
def test_a_long_document_without_ascii_letters_is_cut_too(dataset_folder: Path, line: str) -> None:
    encode = exact_encoder(dataset_folder / "tokenizer.json")
    text = f"{line}\n" * (2**20 // len(line.encode()))
    pieces = list(cut_document(text.encode(), encode))
    assert len(pieces) > 2 and max(map(len, pieces)) < 2 * PIECE_BYTES
    assert np.array_equal(np.concatenate([encode(piece.decode()) for piece in pieces]), encode(text))


def test_cutting_changes_no_id_of_gpt2(tokenizer_file: Path) -> None:
    encode = exact_encoder(tokenizer_file)
    text = hard_document(2, 500_000)
    pieces = list(cut_document(text.encode(), encode))
    assert len(pieces) > 2
    assert np.array_equal(np.concatenate([encode(piece.decode()) for piece in pieces]), encode(text))


def test_a_tokenizer_that_joins_over_newlines_is_never_cut_there(tmp_path: Path) -> None:
    """One whose words are whole lines with their newline before them: every cut that GPT-2 allows must be tried."""
    tokenizer = Tokenizer.from_str(train_bpe(iter(["a b\nc d\n" * 1000]), 259).backend_tokenizer.to_str())
    content = json.loads(tokenizer.to_str())
    content["pre_tokenizer"]["use_regex"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    encode = exact_encoder(tmp_path / "tokenizer.json")
    text = "a b\nc d\n" * (PIECE_BYTES // 4)
    pieces = list(cut_document(text.encode(), encode))
    assert np.array_equal(np.concatenate([encode(piece.decode()) for piece in pieces]), encode(text))


def test_a_trained_tokenizer_returns_what_a_gpt2_takes(dataset_folder: Path) -> None:
    """No token_type_ids, which PreTrainedTokenizerFast returns unless told otherwise."""
    assert list(load_tokenizer(str(dataset_folder))("some text")) == ["input_ids", "attention_mask"]


def test_too_few_entries_for_a_bpe_are_refused() -> None:
    with pytest.raises(ValueError, match=r"257 entries, not 256 \(256 bytes and .* take 257\)"):
        train_bpe(iter(["text"]), 256)


def test_the_fast_path_gives_every_id_of_tokenizers(tokenizer_file: Path, texts: list[str]) -> None:
    pytest.importorskip("gigatoken", reason="the extra `fast` is not installed")
    exact, fast = exact_encoder(tokenizer_file), fast_encoder(tokenizer_file)
    for text in (HARD_TEXT, "", "<|endoftext|>", hard_document(3, 50_000), *texts):
        assert np.array_equal(exact(text), fast(text))


@pytest.mark.parametrize("difference", ["use_regex", "normalizer"])
def test_the_fast_path_is_refused_where_it_differs(tokenizer_file: Path, tmp_path: Path, difference: str) -> None:
    pytest.importorskip("gigatoken", reason="the extra `fast` is not installed")
    content = json.loads(tokenizer_file.read_text("utf-8"))
    if difference == "use_regex":
        content["pre_tokenizer"]["use_regex"] = False
    else:
        content["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(ValueError, match=r"--fast (gives other ids|does not know this kind)"):
        check_fast(tmp_path / "tokenizer.json", ["Some Text"])


def test_without_its_package_the_fast_path_says_what_to_install(dataset_folder: Path) -> None:
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install gigatoken"):
            check_fast(dataset_folder / "tokenizer.json", [])
    else:
        check_fast(dataset_folder / "tokenizer.json", ["and with it, it works"])
