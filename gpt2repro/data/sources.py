"""Sources of documents: the text that comes with Python, files, and datasets of the Hub in streaming mode.

    source = open_source("files", files=["corpus/*.jsonl.zst"])
    for document in source.documents():          # always in the same order
        document.text                            # UTF-8 bytes, or the Path of a text file
        document.position                        # documents(position) continues after this document

Nothing is dropped here: a record without usable text comes as a document with the reason in `skipped`. Compressed
files, parquet and the Hub need the packages pyarrow and `datasets`, which are imported where they are used.
"""

import ast
import codecs
import glob
import hashlib
import io
import json
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from gpt2repro.data.hashes import known_sha256

NOT_TEXT, NOT_UTF8 = "not_text", "not_utf8"
LONG_LINE = 2**24  # bytes of JSON above which pyarrow decodes it: a Python string takes up to 4 bytes a character
FILES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
TOKENS_PER_BYTE = {".gz": 0.75, ".zst": 1.0, ".parquet": 0.6}  # of a file; English text has 1/4
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
HUB = {
    "fineweb-edu": {"dataset": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT"},
    "fineweb": {"dataset": "HuggingFaceFW/fineweb", "config": "sample-10BT"},
    "openwebtext": {"dataset": "Skylion007/openwebtext"},
    "tinyshakespeare": {"dataset": SHAKESPEARE},
}
SOURCES = ("python-docs", "files", "text", "hub", *HUB)
WITHOUT_CHOICES = ("python-docs", "files", "text", "tinyshakespeare")  # of configuration, split and revision

Text = bytes | memoryview | Path  # a Path is the whole file, read in pieces


@dataclass(slots=True)
class Document:
    """One document, or a record without usable text (`skipped` is the reason)."""

    text: Text
    skipped: str | None
    position: Any  # a JSON value: documents(position) continues after this one
    where: str = ""  # for messages
    split: str | None = None  # train or val, where the source decides


@dataclass
class Source:
    """What dataset.json records of a source, and its documents."""

    record: dict
    documents: Callable[..., Iterator[Document]]  # documents(position=None): those after a document's position
    tokens: float = 0.0  # estimated number of GPT-2 tokens; 0 where it is unknown
    whole_files: int = 1  # into how many parts the source divides without each of them reading all of it
    one_document: bool = False
    files: dict[Path, dict] = field(default_factory=dict)  # those that are read, and their entries in the record

    def record_contents(self) -> None:
        """Add the hashes of the files to the record: names and sizes tell little."""
        for entry, sha256 in zip(self.files.values(), known_sha256(self.files), strict=True):
            entry["sha256"] = sha256


def open_source(
    name: str, *, files: list[str] | None = None, text_field: str = "text", part: tuple[int, int] = (0, 1), **hub: Any
) -> Source:
    """Open a source by its name, one of SOURCES.

    files: paths and globs, for the sources "files" and "text". hub: dataset, config, split, revision, for the others.
    part: (I, N) is the I-th of N parts: whole files where there are at least N of them, else every N-th document.

    Raises:
        ValueError: an unknown name, options that the source does not have, or a source that cannot be opened.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}: one of {', '.join(SOURCES)}")
    for owner, flag, value in ("files", "--files GLOB", files), ("hub", "--dataset NAME", hub.get("dataset")):
        if (name == owner or (name == "text" and owner == "files")) != bool(value):
            raise ValueError(f"source {name} with {value}: --source {owner} and {flag} go together")
    if hub and name in WITHOUT_CHOICES:
        raise ValueError(f"{', '.join(hub)} mean nothing to source {name}; omit them")
    if name == "python-docs":
        source = _python_docs()
    elif name == "files":
        source = _files(files or [], text_field=text_field, part=part)
    elif name == "text":
        source = _own_text(files or [])
    else:
        source = _hub(text_field=text_field, part=part, **{**HUB.get(name, {}), **hub})
    source.tokens /= part[1]
    if source.whole_files < part[1]:
        source.documents = partial(_every_nth, source.documents, part)
    return source


def was_made_from(record: dict, name: str, files: list[str]) -> bool:
    """Whether the `source` that a dataset.json records is this one. Deleted files are compared by kind alone."""
    if name not in ("files", "text"):
        return record.get("dataset", record.get("name")) == HUB.get(name, {"dataset": name})["dataset"]
    try:
        now = _files(files) if name == "files" else _own_text(files)
    except ValueError:
        return record.get("name") == name
    now.record_contents()
    return same_source(record, now.record)


def same_source(recorded: dict, now: dict) -> bool:
    """Whether two records name one source. A file is compared by all that is recorded of it, once without its hash."""
    files, files_now = recorded.get("files", []), now.get("files", [])
    others = {**recorded, "files": len(files)} == {**now, "files": len(files_now)}
    return others and all(old.items() <= new.items() for old, new in zip(files, files_now, strict=True))


def _every_nth(documents: Callable, part: tuple[int, int], position: Any = None) -> Iterator[Document]:
    first, inner_position = position or (0, None)
    for number, document in enumerate(documents(inner_position), first):
        if number % part[1] == part[0]:
            document.position = (number + 1, document.position)
            yield document


# ---------------------------------------------------------------------------------------------------- python-docs


def _python_docs() -> Source:
    """English that every Python comes with: its language reference, and the standard library's long docstrings."""
    from pydoc_data.topics import topics

    reference = set(topics.values())  # sets, sorted: the order in which the disk lists the library must not matter
    texts = sorted(reference) + sorted(_docstrings() - reference)

    def documents(position: int | None = None) -> Iterator[Document]:
        for number, text in islice(enumerate(texts, 1), position or 0, None):
            yield Document(text.encode(), None, number)

    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    record = {"name": "python-docs", "python": platform.python_version(), "sha256": digest}
    return Source(record, documents, tokens=sum(map(len, texts)) / 4)


def _docstrings() -> set[str]:
    """Docstrings of 200 characters and more, parsed from the library's files; nothing is imported."""
    library, docstrings = Path(sysconfig.get_paths()["stdlib"]), set()
    for file in library.rglob("*.py"):
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & {*file.relative_to(library).parts}:
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue  # lib2to3 keeps files in old syntax
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstrings.add(ast.get_docstring(node) or "")
    return {text for text in docstrings if len(text) >= 200}


# ---------------------------------------------------------------------------------------------------- files


def _files(patterns: list[str], *, text_field: str = "text", part: tuple[int, int] = (0, 1)) -> Source:
    """Files in the order given, those of a glob sorted, each once."""
    paths = list(dict.fromkeys(path for pattern in patterns for path in _matching(pattern)))
    for path in paths:
        if not path.name.endswith(FILES):
            raise ValueError(f"{path} is of no known kind: {', '.join(FILES)}")
    chosen = paths[part[0] :: part[1]] if part[1] <= len(paths) else paths
    entries = {path: {"file": path.name, "bytes": path.stat().st_size} for path in paths}
    return Source(
        {"name": "files", "text_field": text_field, "files": [*entries.values()]},
        partial(_file_documents, chosen, text_field),
        tokens=sum(path.stat().st_size * TOKENS_PER_BYTE.get(path.suffix, 0.25) for path in paths),
        whole_files=len(paths),
        one_document=len(paths) == 1 and paths[0].suffix in (".txt", ".md"),
        files={path: entries[path] for path in chosen},
    )


def _own_text(patterns: list[str]) -> Source:
    """Plain text of any suffix; the first nine tenths of each file's bytes are for training, the rest validates."""
    paths = list(dict.fromkeys(path for pattern in patterns for path in _matching(pattern)))
    entries: dict[Path, dict] = {path: {"file": path.name, "bytes": path.stat().st_size} for path in paths}

    def documents(position: int | None = None) -> Iterator[Document]:
        for number in range(position or 0, 2 * len(paths)):
            text = paths[number // 2].read_bytes().removeprefix(codecs.BOM_UTF8)
            cut = len(text) * 9 // 10
            while cut and text[cut] & 0xC0 == 0x80:  # inside of a character
                cut -= 1
            part, split = (text[cut:], "val") if number % 2 else (text[:cut], "train")
            yield Document(part, None, number + 1, str(paths[number // 2]), split)

    record = {"name": "text", "files": [*entries.values()]}
    return Source(record, documents, tokens=sum(entry["bytes"] for entry in entries.values()) / 4, files=entries)


def _matching(pattern: str) -> list[Path]:
    """The file of that name, or the files that match it as a glob below the part of it that is an existing folder."""
    path = Path(os.path.expanduser(pattern))
    folder = next(parent for parent in (path, *path.parents) if parent.exists())  # may have [brackets] in its name
    names = glob.glob(str(path.relative_to(folder)), root_dir=folder, recursive=True)
    matches = [path] if path.is_file() else [folder / name for name in sorted(names) if (folder / name).is_file()]
    if not matches:
        raise ValueError(f"no file matches {pattern!r}; give a file, or a glob in quotes such as 'folder/*.jsonl'")
    return matches


def _file_documents(paths: list[Path], text_field: str, position: Any = None) -> Iterator[Document]:
    first, inner_position = position or (0, None)
    for index, path in enumerate(paths[first:], first):
        read = {".txt": _text, ".md": _text, ".parquet": _parquet}.get(path.suffix, _json_lines)
        for document in read(path, text_field, inner_position if index == first else None):
            document.position = (index, document.position)
            yield document


def _text(path: Path, text_field: str, position: Any) -> Iterator[Document]:
    if position is None:
        yield Document(path, None, "read", str(path))


def _json_lines(path: Path, text_field: str, position: tuple[int, int] | None) -> Iterator[Document]:
    """One document a line. Not through `datasets`, where one bad line fails a whole block."""
    done, number = position or (0, 0)  # bytes of the decompressed text, and lines
    is_first = not done
    with _open_lines(path) as lines:
        at = lines.seek(done) if path.suffix == ".jsonl" else 0
        try:
            for line in lines:
                at += len(line)
                if at <= done:
                    continue
                number += 1
                where = f"{path}, line {number}"
                if is_first and not line.isspace():
                    _check_kind(line, text_field, where)
                    is_first = False
                text, skipped = _line_text(line, text_field)
                del line  # it may be large, and the document is processed next
                yield Document(text, skipped, (at, number), where)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} cannot be read to its end ({error}); it is damaged: copy it again") from error


def _check_kind(line: bytes, text_field: str, where: str) -> None:
    """Refuse a file whose first record has no such field of text, before hours of records without text are counted."""
    if len(line) > LONG_LINE:
        return
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeError:
        return
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{where} is no JSON object, but {line[:60]!r}; .jsonl has one on each line")
    if not isinstance(record.get(text_field, 0), str | None):
        kinds = {name: type(value).__name__ for name, value in record.items()}
        raise ValueError(f"{where} has no text in a field {text_field!r}, only {kinds}; name it with --text-field")


def _open_lines(path: Path) -> io.BufferedReader:
    if path.suffix == ".jsonl":
        return open(path, "rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path)), 2**20)  # the suffix names the compression


def _line_text(line: bytes, text_field: str) -> tuple[Text, str | None]:
    if line.isspace():
        return b"", None
    try:
        if len(line) > LONG_LINE:
            return _long_line_text(line, text_field)
        record = json.loads(line.decode("utf-8-sig"))
        text = record.get(text_field) if isinstance(record, dict) else None
        return (text.encode(), None) if isinstance(text, str) else (b"", NOT_TEXT)
    except UnicodeError:  # bytes that are not UTF-8, or half a surrogate pair
        return b"", NOT_UTF8
    except (ValueError, OverflowError, RecursionError):
        return b"", NOT_TEXT


def _long_line_text(line: bytes, text_field: str) -> tuple[Text, str | None]:
    import pyarrow
    from pyarrow import json as arrow_json

    schema = pyarrow.schema([(text_field, pyarrow.string())])
    one_field = arrow_json.ParseOptions(schema, unexpected_field_behavior="ignore")
    one_block = arrow_json.ReadOptions(use_threads=False, block_size=len(line) + 1)
    text = arrow_json.read_json(pyarrow.BufferReader(line), one_block, one_field)[text_field][0].as_buffer()
    return (b"", NOT_TEXT) if text is None else (memoryview(text), None)


def _parquet(path: Path, text_field: str, position: Any) -> Iterator[Document]:
    import datasets
    import pyarrow

    file = glob.escape(str(path))
    try:
        stream = datasets.load_dataset("parquet", data_files=file, split="train", streaming=True)
        yield from _arrow_documents(stream, text_field, str(path), position)
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read to its end ({reason}); it is damaged: copy it again") from error


# ---------------------------------------------------------------------------------------------------- the Hub


def _arrow_documents(stream: Any, text_field: str, name: str, position: Any = None) -> Iterator[Document]:
    """Documents of a streaming `datasets` dataset; a position is the dataset's state and the rows done since."""
    stream, done = stream.with_format("arrow"), 0
    if position:
        stream.load_state_dict(position["state"])
        done = position["rows"]
    state = stream.state_dict()
    for table in stream.iter(batch_size=256):
        kinds = {field.name: str(field.type) for field in table.schema}
        if kinds.get(text_field) not in ("string", "large_string"):
            raise ValueError(f"{name} has no text in a field {text_field!r}, only {kinds}; name it with --text-field")
        for row, value in islice(enumerate(table[text_field]), done, None):
            text = value.as_buffer()  # without a copy, and without a check for UTF-8, which prepare does
            skipped = NOT_TEXT if text is None else None
            yield Document(memoryview(text or b""), skipped, {"state": state, "rows": row + 1}, name)
        state, done = stream.state_dict(), 0


def _hub(
    dataset: str, *, config: str | None = None, split: str = "train", revision: str | None = None,
    text_field: str, part: tuple[int, int],
) -> Source:
    """A dataset of the Hub at one fixed commit, or a local folder laid out like one, streamed by `datasets`."""
    import datasets
    from huggingface_hub import HfApi

    path, one_file = os.path.expanduser(dataset), dataset == SHAKESPEARE
    local = Path(path).is_dir()
    if local and glob.escape(path) != path:
        raise ValueError(f"the library `datasets` takes [, * and ? in {path} as a pattern: rename the folder")
    options: dict = {"path": path, "name": config}
    try:
        if one_file:
            options = {"path": "text", "data_files": dataset, "sample_by": "document"}
        elif not local:
            revision = HfApi().dataset_info(dataset, revision=revision, timeout=10).sha
        stream = datasets.load_dataset(**options, split=split, revision=revision, streaming=True)
    except Exception as error:  # the http client, the Hub, the file system and the builder each have their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        offline = "--source files, --source hub --dataset FOLDER (a downloaded repository), or --source python-docs"
        raise ValueError(f"the dataset {dataset} cannot be opened ({reason}); without a network: {offline}") from error
    whole_files = stream.num_shards
    if 1 < part[1] <= whole_files:
        stream = stream.shard(num_shards=part[1], index=part[0])
    name = Path(path).name if local else dataset
    record: dict = {"name": "hub", "dataset": name, "config": config, "split": split}
    record |= {"text_field": text_field, "revision": revision}
    sample = re.fullmatch(r"sample-(\d+)BT", config or "")  # the name counts GPT-2 tokens in billions
    tokens = 1_115_394 / 4 if one_file else int(sample[1]) * 1e9 if sample else 0.0
    documents = partial(_arrow_documents, stream, text_field, dataset)
    return Source(record, documents, tokens, whole_files, one_document=one_file)
