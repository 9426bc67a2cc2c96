"""Where documents come from: the text embedded in Python itself, files, and datasets of the Hub in streaming mode.

    source = open_source("files", files=["corpus/*.jsonl.zst"])
    for document in source.documents():          # in an order that never changes
        document.text                            # UTF-8 bytes, or the Path of a text file
        document.position                        # documents(position) goes on after this document

Nothing is dropped here: a record that is no text comes as a document with the reason in `skipped`. Compressed
files, parquet and the Hub need the packages pyarrow and `datasets`, which are imported where they are used.
"""

import ast
import glob
import hashlib
import io
import json
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

NOT_TEXT, NOT_UTF8 = "not_text", "not_utf8"
LONG_LINE = 2**24  # bytes of JSON from which a Python string, up to 4 bytes a character, would be too large a detour
FILES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
TOKENS_PER_BYTE = {".gz": 0.75, ".zst": 1.0, ".parquet": 0.6}  # of a file; 1/4, as of English, where there is no entry
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
HUB = {
    "fineweb-edu": {"dataset": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT"},
    "fineweb": {"dataset": "HuggingFaceFW/fineweb", "config": "sample-10BT"},
    "openwebtext": {"dataset": "Skylion007/openwebtext"},
    "tinyshakespeare": {"dataset": SHAKESPEARE},
}
SOURCES = ("python-docs", "files", "hub", *HUB)
WITHOUT_CHOICES = ("python-docs", "files", "tinyshakespeare")  # of configuration, split and revision

Text = bytes | memoryview | Path  # a Path: the whole file, read in pieces


@dataclass(slots=True)
class Document:
    """One document, or a record that is none (`skipped` says why)."""

    text: Text = b""
    skipped: str | None = None
    position: Any = None  # a JSON value: where documents() goes on after this one
    done: float | None = None  # the fraction of the source that is read, where it is known


@dataclass
class Source:
    """What is recorded of a source in dataset.json, and its documents."""

    record: dict
    documents: Callable[..., Iterator[Document]]  # documents(position=None): those after a document's position
    tokens: float = 0.0  # an estimate of GPT-2's, for the disk; 0 where there is none
    whole_files: int = 1  # into how many parts it divides without each of them reading the whole
    one_document: bool = False


def open_source(
    name: str, *, files: list[str] | None = None, text_field: str = "text", part: tuple[int, int] = (0, 1), **hub: Any
) -> Source:
    """The source of that name.

    files: paths and globs, of the source "files". hub: dataset, config, split, revision, of the others. part (I, N):
    the I-th of N parts, in whole files if there are so many, else every N-th document.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}: one of {', '.join(SOURCES)}")
    for owner, flag, value in ("files", "--files GLOB", files), ("hub", "--dataset NAME", hub.get("dataset")):
        if (name == owner) != bool(value):
            raise ValueError(f"source {name} with {value}: --source {owner} and {flag} go together")
    if hub and name in WITHOUT_CHOICES:
        raise ValueError(f"{', '.join(hub)} mean nothing to source {name}; omit them")
    if name == "python-docs":
        source = _python_docs()
    elif name == "files":
        source = _files(files or [], text_field=text_field, part=part)
    else:
        source = _hub(text_field=text_field, part=part, **{**HUB.get(name, {}), **hub})
    source.tokens /= part[1]
    if source.whole_files < part[1]:
        source.documents = partial(_every_nth, source.documents, part)
    return source


def _every_nth(documents: Callable, part: tuple[int, int], position: Any = None) -> Iterator[Document]:
    first, inside = position or (0, None)
    for ordinal, document in enumerate(documents(inside), first):
        if ordinal % part[1] == part[0]:
            document.position = (ordinal + 1, document.position)
            yield document


def was_made_from(record: dict, name: str, files: list[str]) -> bool:
    """Whether the `source` that a dataset.json records is this one. Files that are gone compare by kind alone."""
    if name != "files":
        return record.get("dataset", record.get("name")) == HUB.get(name, {"dataset": name})["dataset"]
    try:
        return record == _files(files).record
    except ValueError:
        return record.get("name") == "files"


def _python_docs() -> Source:
    """English that every Python carries: its language reference, and the standard library's long docstrings."""
    from pydoc_data.topics import topics

    reference = {*topics.values()}  # by set and sort: the same in whichever order the file system lists the library
    texts = sorted(reference) + sorted(_docstrings() - reference)

    def documents(position: int | None = None) -> Iterator[Document]:
        for number, text in enumerate(texts[position or 0 :], 1 + (position or 0)):
            yield Document(text.encode(), None, number, number / len(texts))

    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    record = {"name": "python-docs", "python": platform.python_version(), "sha256": digest}
    return Source(record, documents, tokens=sum(map(len, texts)) / 4)


def _docstrings() -> set[str]:
    """Docstrings of 200 characters and more, parsed from the library's files; nothing is imported."""
    library, found = Path(sysconfig.get_paths()["stdlib"]), set()
    for file in library.rglob("*.py"):
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & {*file.relative_to(library).parts}:
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue  # lib2to3 keeps files in old syntax
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(ast.get_docstring(node) or "")
    return {text for text in found if len(text) >= 200}


def _files(patterns: list[str], *, text_field: str = "text", part: tuple[int, int] = (0, 1)) -> Source:
    """Files in the order given, globs sorted, each once."""
    paths: dict[Path, int] = {}
    for pattern in patterns:
        matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        found = {Path(match): Path(match).stat().st_size for match in matches if Path(match).is_file()}
        if not found:
            raise ValueError(f"no file matches {pattern!r}; give a file, or a glob in quotes such as 'folder/*.jsonl'")
        paths |= found
    for path in paths:
        if not path.name.endswith(FILES):
            raise ValueError(f"{path} is of no known kind: {', '.join(FILES)}")
    mine = list(paths)[part[0] :: part[1]] if part[1] <= len(paths) else list(paths)
    sizes = [{"file": path.name, "bytes": size} for path, size in paths.items()]
    return Source(
        {"name": "files", "text_field": text_field, "files": sizes},
        partial(_file_documents, mine, text_field),
        tokens=sum(size * TOKENS_PER_BYTE.get(path.suffix, 0.25) for path, size in paths.items()),
        whole_files=len(paths),
        one_document=len(paths) == 1 and mine[0].suffix in (".txt", ".md"),
    )


def _file_documents(paths: list[Path], text_field: str, position: Any = None) -> Iterator[Document]:
    first, inside = position or (0, None)
    sizes = [path.stat().st_size for path in paths]
    for index, path in enumerate(paths[first:], first):
        read = {".txt": _text, ".md": _text, ".parquet": _parquet}.get(path.suffix, _json_lines)
        for document in read(path, text_field, inside if index == first else None):
            document.position = (index, document.position)
            document.done = (sum(sizes[:index]) + (document.done or 0) * sizes[index]) / (sum(sizes) or 1)
            yield document


def _text(path: Path, text_field: str, position: Any) -> Iterator[Document]:
    if position is None:
        yield Document(path, None, "read", 1.0)


def _json_lines(path: Path, text_field: str, position: int | None) -> Iterator[Document]:
    """One document a line. Our own reading rather than `datasets`': theirs fails a whole block for one bad line."""
    size, at = path.stat().st_size, 0
    with open(path, "rb") as raw:
        try:
            lines: Any = raw
            if path.suffix in COMPRESSION:
                import pyarrow

                lines = io.BufferedReader(pyarrow.input_stream(raw, compression=COMPRESSION[path.suffix]), 2**20)
            elif position:
                at = lines.seek(position)
            for line in lines:
                at += len(line)
                if at > (position or 0):
                    text, skipped = _line_text(line, text_field)
                    del line  # it may be large, and the document is about to be worked on
                    yield Document(text, skipped, at, raw.tell() / size)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} cannot be read to its end ({error}); it is damaged: copy it again") from error


def _line_text(line: bytes, text_field: str) -> tuple[Text, str | None]:
    try:
        if len(line) > LONG_LINE:
            return _long_line_text(line, text_field)
        record = json.loads(line) if line.strip() else {text_field: ""}
        text = record.get(text_field) if isinstance(record, dict) else None
        return (text.encode(), None) if isinstance(text, str) else (b"", NOT_TEXT)
    except UnicodeError:  # bytes that are no UTF-8, or half a surrogate pair
        return b"", NOT_UTF8
    except ValueError:
        return b"", NOT_TEXT


def _long_line_text(line: bytes, text_field: str) -> tuple[Text, str | None]:
    import pyarrow
    from pyarrow import json as arrow_json

    schema = pyarrow.schema([(text_field, pyarrow.string())])
    whole = arrow_json.ReadOptions(use_threads=False, block_size=len(line) + 1)
    alone = arrow_json.ParseOptions(schema, unexpected_field_behavior="ignore")
    text = arrow_json.read_json(pyarrow.BufferReader(line), whole, alone)[text_field][0].as_buffer()
    return (b"", NOT_TEXT) if text is None else (memoryview(text), None)


def _parquet(path: Path, text_field: str, position: Any) -> Iterator[Document]:
    import datasets

    stream = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    yield from _arrow_documents(stream, text_field, str(path), position)


def _arrow_documents(stream: Any, text_field: str, name: str, position: Any = None) -> Iterator[Document]:
    """The documents of a streaming `datasets` dataset; the position is its own state and the rows done since."""
    stream = stream.with_format("arrow")
    done = 0
    if position:
        stream.load_state_dict(position["state"])
        done = position["rows"]
    state = stream.state_dict()
    for table in stream.iter(batch_size=256):
        kinds = {field.name: str(field.type) for field in table.schema}
        if kinds.get(text_field) not in ("string", "large_string"):
            raise ValueError(f"{name} has no text in a field {text_field!r}, only {kinds}; name it with --text-field")
        for row, value in islice(enumerate(table[text_field]), done, None):
            text = value.as_buffer()  # without a copy, and without a check for UTF-8: prepare checks and counts
            skipped = NOT_TEXT if text is None else None
            yield Document(memoryview(text or b""), skipped, {"state": state, "rows": row + 1})
        state, done = stream.state_dict(), 0


def _hub(
    dataset: str, *, config: str | None = None, split: str = "train", revision: str | None = None,
    text_field: str, part: tuple[int, int],
) -> Source:  # fmt: skip
    """A dataset of the Hub, or a local folder laid out like one, streamed by `datasets` at one fixed commit."""
    import datasets
    from huggingface_hub import HfApi

    local, one_file = Path(dataset).is_dir(), dataset == SHAKESPEARE
    options: dict = {"path": dataset, "name": config}
    try:
        if one_file:
            options = {"path": "text", "data_files": dataset, "sample_by": "document"}
        elif not local:
            revision = HfApi().dataset_info(dataset, revision=revision, timeout=10).sha
        stream = datasets.load_dataset(**options, split=split, revision=revision, streaming=True)
    except Exception as error:  # each layer below has its own: http client, hub, file system, builder
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the dataset {dataset} cannot be opened ({reason}). Without a network: --source files --files GLOB, "
            "--source hub --dataset FOLDER for a downloaded repository, or --source python-docs, which needs nothing"
        ) from error
    whole_files = stream.num_shards
    if 1 < part[1] <= whole_files:
        stream = stream.shard(num_shards=part[1], index=part[0])
    record = {"name": "hub", "dataset": Path(dataset).name if local else dataset, "config": config, "split": split,
              "text_field": text_field, "revision": revision}  # fmt: skip
    sample = re.fullmatch(r"sample-(\d+)BT", config or "")  # the name counts GPT-2 tokens in billions
    tokens = 1_115_394 / 4 if one_file else int(sample[1]) * 1e9 if sample else 0.0
    documents = partial(_arrow_documents, stream, text_field, dataset)
    return Source(record, documents, tokens, whole_files, one_document=one_file)
