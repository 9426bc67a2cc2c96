"""Encoding of documents: the encoders, the split of a document, the cutting of long ones, training a byte-level BPE.

Text is only text: a document that spells out "<|endoftext|>" does not get the token that separates documents.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpt2repro.data.sources import NOT_UTF8, Document, Text

EOT = "<|endoftext|>"
EMPTY = "empty"
PIECE_BYTES = 2**18  # longer documents are encoded in pieces: tokenizers takes some 60 bytes of memory a byte of text
CONTEXT_BYTES = 200  # on either side of a cut, for the check that it changes no id
CUT_BYTES = 2**14  # the end of a piece, in which a place for the cut is searched
# GPT-2's pattern always begins a new word before a newline or a space that a visible character follows.
# Beyond ASCII all bytes count as visible; a place where that is wrong (a no-break space) fails the check.
CUT = re.compile(rb"(?:\n|(?<=[!-~\x80-\xff]) )(?=[!-~\x80-\xff])")
RENEW_BYTES = 2**28  # of text, after which a fast encoder is replaced: its cache of words has no bound
HARD_TEXT = (  # cases in which tokenizers differ; a sample of the input is compared as well
    " a  b\n\n c\t\td \r\n\r\n\u00a0e\u3000f\u2028g\u0085h don't WE'LL i'Ve 12345 3.14 x_y $£€ naïve na\u0308ve "
    f"東京都 ไทย 🙂👩\u200d👩\u200d👧 {EOT}\x00\x1c\ufeff  "
)

Encode = Callable[[str], np.ndarray]


def exact_encoder(tokenizer_file: Path) -> Encode:
    """The encoder of `tokenizers` for a tokenizer.json. Ids as uint32."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # as text, split like any other
    # encode_batch_fast leaves out character offsets (1.3 times the speed); a batch of one uses one core.
    return lambda text: np.array(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.uint32)


def fast_encoder(tokenizer_file: Path) -> Encode:
    """The encoder of the package gigatoken, many times as fast; `check_fast` compares its ids."""
    try:
        import gigatoken
    except ImportError as error:
        raise ValueError("--fast needs the package gigatoken: pip install gigatoken") from error
    content = json.loads(tokenizer_file.read_text("utf-8"))
    content["added_tokens"] = []  # so that special tokens in a text are text
    new_tokenizer = partial(gigatoken.Tokenizer.from_json, json.dumps(content))
    try:
        tokenizer, remaining = new_tokenizer(), RENEW_BYTES
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--fast does not know this kind of tokenizer ({reason}); leave it out") from error

    def encode(text: str) -> np.ndarray:
        nonlocal tokenizer, remaining
        remaining -= len(text)
        if remaining < 0:
            tokenizer, remaining = new_tokenizer(), RENEW_BYTES
        return tokenizer.encode(text)

    return encode


def check_fast(tokenizer_file: Path, texts: Iterable[str]) -> None:
    """Raise ValueError unless the fast encoder gives every id that `tokenizers` gives for these texts."""
    exact, fast = exact_encoder(tokenizer_file), fast_encoder(tokenizer_file)
    for text in (HARD_TEXT, *texts):
        if not np.array_equal(exact(text), fast(text)):
            raise ValueError(f"--fast gives other ids than tokenizers for {text[:60]!r}…; leave it out")


def chunks(text: Text) -> Iterator[bytes]:
    """A document's bytes, PIECE_BYTES at a time, without a file's byte order mark."""
    if isinstance(text, Path):
        with open(text, "rb") as file:
            yield file.read(PIECE_BYTES).removeprefix(codecs.BOM_UTF8)
            yield from iter(partial(file.read, PIECE_BYTES), b"")
    else:
        for start in range(0, len(text), PIECE_BYTES):
            yield bytes(text[start : start + PIECE_BYTES])


def split_of(document: Document, val_fraction: float) -> str:
    """train or val, or why the document belongs to neither. Holds one chunk in memory.

    As its source says, else by the document's own sha256, so that duplicates are in the same split and the order does
    not matter.
    """
    decoder, digest, blank = codecs.getincrementaldecoder("utf-8")(), hashlib.sha256(), True
    try:
        for chunk in chunks(document.text):
            digest.update(chunk)
            blank = not decoder.decode(chunk).strip() and blank
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return NOT_UTF8
    if document.skipped or blank:
        return document.skipped or EMPTY
    if document.split:
        return document.split
    return "val" if int.from_bytes(digest.digest()[:8], "big") >= (1 - val_fraction) * 2**64 else "train"


def cut_document(text: Text, encode: Encode) -> Iterator[bytes]:
    """Pieces of about PIECE_BYTES, at least one, whose ids, joined, are those of the whole document."""
    rest = b""
    for chunk in chunks(text):
        rest += chunk
        if len(rest) > PIECE_BYTES and (at := _cut_place(rest, encode)):
            yield rest[:at]
            rest = rest[at:]
    yield rest


def _cut_place(text: bytes, encode: Encode) -> int | None:
    """A place near the end where a cut changes no id. Each is tried: not every tokenizer splits words as GPT-2's."""
    places = [match.start() for match in CUT.finditer(text, len(text) - CUT_BYTES, len(text) - CONTEXT_BYTES)]
    for at in reversed(places):
        left = text[max(0, at - CONTEXT_BYTES) : at].decode(errors="ignore")
        right = text[at : at + CONTEXT_BYTES].decode(errors="ignore")
        if np.array_equal(encode(left + right), np.concatenate([encode(left), encode(right)])):
            return at
    return None


def train_bpe(texts: Iterator[str], entries: int) -> Any:
    """A byte-level BPE like GPT-2's with `entries` entries; <|endoftext|> is one of them (id 0).

    Raises:
        ValueError: the text is too short for that many entries, or they are fewer than the bytes take.
    """
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, entries, min_frequency=0, show_progress=False, special_tokens=[EOT])
    if (size := trained.get_vocab_size()) != entries:
        wanted = f"not {entries:,} (256 bytes and {EOT} take 257)"
        raise ValueError(f"the text gives a tokenizer of {size:,} entries, {wanted}; ask for another number")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained.to_str()), bos_token=EOT, eos_token=EOT, unk_token=EOT,
        clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"],
    )
