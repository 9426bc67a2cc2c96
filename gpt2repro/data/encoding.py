"""Documents -> token ids: the encoder of a worker, the fast path, cutting huge documents, training a byte-level BPE.

Text is only text: a document that spells out "<|endoftext|>" does not get the token that separates documents.
"""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpt2repro.data.sources import NOT_UTF8, Text

EOT = "<|endoftext|>"
EMPTY = "empty"
PIECE_BYTES = 2**18  # longer documents are encoded in pieces: tokenizers takes some 60 bytes of memory a byte of text
CONTEXT_BYTES = 200  # on either side of a cut, for the check that it changes no id
RENEW_BYTES = 2**28  # of text, after which a fast encoder is made anew: its cache of words has no bound
HARD_TEXT = (  # where tokenizers differ, if they do; a sample of the input is compared as well
    " a  b\n\n c\t\td \r\n\r\n\u00a0e\u3000f\u2028g\u0085h don't WE'LL i'Ve 12345 3.14 x_y $£€ naïve na\u0308ve "
    f"東京都 ไทย 🙂👩\u200d👩\u200d👧 {EOT}\x00\x1c\ufeff  "
)

Encode = Callable[[str], np.ndarray]


def exact_encoder(tokenizer_file: Path) -> Encode:
    """Encode as `tokenizers` does, with the tokenizer of a tokenizer.json. Ids as uint32."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # as text, that is: split like any other
    # encode_batch_fast leaves out character offsets (1.3 times the speed); a batch of one uses one core.
    return lambda text: np.array(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.uint32)


def fast_encoder(tokenizer_file: Path) -> Encode:
    """The same ids through the package gigatoken, many times as fast; `check_fast` says whether they are the same."""
    try:
        import gigatoken
    except ImportError as error:
        raise ValueError("--fast needs the package gigatoken: pip install gigatoken") from error
    content = json.loads(tokenizer_file.read_text("utf-8"))
    content["added_tokens"] = []  # so that special tokens in a text are text
    tokenizer: Any = None
    left = 0

    def encode(text: str) -> np.ndarray:
        nonlocal tokenizer, left
        if left <= 0:
            try:
                tokenizer, left = gigatoken.Tokenizer.from_json(json.dumps(content)), RENEW_BYTES
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"--fast does not know this kind of tokenizer ({reason}); leave it out") from error
        left -= len(text)
        return tokenizer.encode(text)

    return encode


def check_fast(tokenizer_file: Path, texts: Iterable[str]) -> None:
    """Raise ValueError unless the fast path gives every id that `tokenizers` gives for these texts."""
    exact, fast = exact_encoder(tokenizer_file), fast_encoder(tokenizer_file)
    for text in (HARD_TEXT, *texts):
        if not np.array_equal(exact(text), fast(text)):
            raise ValueError(
                f"--fast gives other ids than tokenizers for a text beginning {text[:60]!r}; leave it out"
            )


def encode_pieces(encode: Encode, eot_id: int, dtype: np.dtype, pieces: list[tuple[bytes, bool]]) -> np.ndarray:
    """The ids of pieces of documents, one after the other, <|endoftext|> before each piece that begins a document."""
    parts = []
    for text, begins in pieces:
        if begins:
            parts.append(np.array([eot_id], dtype=dtype))
        parts.append(encode(text.decode()).astype(dtype))
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)


def chunks(text: Text) -> Iterator[bytes]:
    """A document's bytes, PIECE_BYTES at a time."""
    if isinstance(text, Path):
        with open(text, "rb") as file:
            yield from iter(partial(file.read, PIECE_BYTES), b"")
    else:
        for start in range(0, len(text), PIECE_BYTES):
            yield bytes(text[start : start + PIECE_BYTES])


def reason_to_skip(text: Text) -> str | None:
    """NOT_UTF8 or EMPTY (nothing but white space), else None. Holds one chunk in memory."""
    decoder, blank = codecs.getincrementaldecoder("utf-8")(), True
    try:
        for chunk in chunks(text):
            part = decoder.decode(chunk)
            blank = blank and (not part or part.isspace())
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return NOT_UTF8
    return EMPTY if blank else None


def cut_document(text: Text, encode: Encode) -> Iterator[bytes]:
    """Pieces of about PIECE_BYTES whose ids, joined, are those of the whole document."""
    rest = b""
    for chunk in chunks(text):
        rest += chunk
        while len(rest) > PIECE_BYTES and (at := _cut_place(rest, encode)):
            yield rest[:at]
            rest = rest[at:]
    yield rest


def _cut_place(text: bytes, encode: Encode) -> int | None:
    """The last place where a cut changes no id: before a newline (else a space) that a visible character follows.

    GPT-2's pattern begins a new word there whatever stands before. Other tokenizers' may not, so each place is tried.
    """
    for separator in b"\n", b" ":
        at = min(len(text), PIECE_BYTES + 1) - 1
        for _ in range(100):
            at = text.rfind(separator, 1, at)
            if at < 1:
                break
            if not 33 <= text[at + 1] <= 126 or (separator == b" " and not 33 <= text[at - 1] <= 126):
                continue
            left = text[max(0, at - CONTEXT_BYTES) : at].decode(errors="ignore")
            right = text[at : at + CONTEXT_BYTES].decode(errors="ignore")
            if np.array_equal(encode(left + right), np.concatenate([encode(left), encode(right)])):
                return at
    return None


def train_bpe(texts: Iterator[str], entries: int) -> Any:
    """A byte-level BPE in GPT-2's manner with `entries` entries, <|endoftext|> (id 0) among them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if entries < 257:
        raise ValueError(f"a byte-level BPE cannot have {entries} entries: 256 bytes and {EOT} take 257; ask for more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[EOT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOT, eos_token=EOT, unk_token=EOT, clean_up_tokenization_spaces=False
    )
