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
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

NOT_TEXT, NOT_UTF8 = "not_text", "not_utf8"
LONG_LINE = 2**24  # bytes of JSON from which a Python string, up to 4 bytes a character, would be too large a detour
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
# Bytes of token ids (2 each, at 4 to 5 bytes of English a token) from one byte of the file, compression undone.
TOKEN_BYTES_PER_FILE_BYTE = {".txt": 0.5, ".md": 0.5, ".jsonl": 0.5, ".gz": 1.5, ".zst": 2.0, ".parquet": 1.2}
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
HUB = {  # source: dataset, configuration
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT"),
    "openwebtext": ("Skylion007/openwebtext", None),
}
SOURCES = ("python-docs", "files", "hub", "tinyshakespeare", *HUB)


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
    parts: int = 1  # into how many parts it divides without each of them reading the whole
    one_document: bool = False
    token_bytes: float | None = None  # an estimate, for the disk

    def documents(self, position: Any = None) -> Iterator[Document]:
        raise NotImplementedError


def open_source(
    name: str,
    *,
    files: list[str] | None = None,
    dataset: str | None = None,
    config: str | None = None,
    split: str = "train",
    text_field: str = "text",
    revision: str | None = None,
    part: tuple[int, int] = (0, 1),
) -> Source:
    """The source of that name. `part` (I, N) asks for the I-th of N parts where whole files can be divided so."""
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}: one of {', '.join(SOURCES)}")
    if (name == "files") != bool(files):
        raise ValueError(f"source {name} with files {files}: --source files and --files GLOB go together")
    if (name == "hub") != bool(dataset):
        raise ValueError(f"source {name} with dataset {dataset}: --source hub and --dataset NAME go together")
    if name in ("python-docs", "files", "tinyshakespeare") and (config or revision or split != "train"):
        raise ValueError(
            f"name {config}, split {split} and revision {revision} mean nothing to source {name}; omit them"
        )
    if name == "python-docs":
        return PythonDocs()
    if name == "files":
        return Files(files or [], text_field=text_field, part=part)
    if name == "tinyshakespeare":
        source = HubDataset("text", data_files=SHAKESPEARE, sample_by="document", offline="input.txt")
        source.token_bytes = 1_115_394 * TOKEN_BYTES_PER_FILE_BYTE[".txt"]
        return source
    dataset, config = (dataset, config) if name == "hub" else (HUB[name][0], config or HUB[name][1])
    return HubDataset(str(dataset), config=config, split=split, text_field=text_field, revision=revision, part=part)


def was_made_from(record: dict, name: str, files: list[str]) -> bool:
    """Whether the `source` that a dataset.json records is this one. Files that are gone compare by kind alone."""
    if name != "files":
        dataset = SHAKESPEARE if name == "tinyshakespeare" else HUB.get(name, (name, None))[0]
        return record.get("dataset", record.get("name")) == dataset
    try:
        return record == Files(files).record
    except ValueError:
        return record.get("name") == "files"


class PythonDocs(Source):
    """English that every Python carries: its language reference, and the standard library's long docstrings."""

    def __init__(self) -> None:
        self._texts = _python_texts()
        digest = hashlib.sha256("\0".join(self._texts).encode()).hexdigest()
        super().__init__({"name": "python-docs", "python": platform.python_version(), "sha256": digest})
        self.token_bytes = sum(map(len, self._texts)) * TOKEN_BYTES_PER_FILE_BYTE[".txt"]

    def documents(self, position: Any = None) -> Iterator[Document]:
        for index in range(position or 0, len(self._texts)):
            yield Document(self._texts[index].encode(), None, index + 1, (index + 1) / len(self._texts))


@cache
def _python_texts() -> list[str]:
    from pydoc_data.topics import topics

    # By set and sort: the same text in whichever order the file system lists the library.
    return sorted({*topics.values()}) + sorted(_docstrings() - {*topics.values()})


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


class Files(Source):
    """.txt and .md (a document each), .jsonl, .jsonl.gz, .jsonl.zst and .parquet, in the order given, globs sorted."""

    def __init__(self, patterns: list[str], *, text_field: str = "text", part: tuple[int, int] = (0, 1)) -> None:
        paths: dict[Path, None] = {}
        for pattern in patterns:
            matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
            if not [match for match in matches if Path(match).is_file()]:
                raise ValueError(
                    f"no file matches {pattern!r}; give a file, or a glob in quotes such as 'folder/*.jsonl'"
                )
            paths |= dict.fromkeys(Path(match) for match in matches if Path(match).is_file())
        for path in paths:
            known = path.suffix in {".txt", ".md", ".jsonl", ".parquet"} or path.suffixes[-2:-1] == [".jsonl"]
            if not known or path.suffix not in TOKEN_BYTES_PER_FILE_BYTE:
                raise ValueError(f"{path} is of no known kind: .txt, .md, .jsonl, .jsonl.gz, .jsonl.zst or .parquet")
        sizes = [{"file": path.name, "bytes": path.stat().st_size} for path in paths]
        super().__init__({"name": "files", "text_field": text_field, "files": sizes}, parts=len(paths))
        self.one_document = len(paths) == 1 and next(iter(paths)).suffix in {".txt", ".md"}
        self.paths, self.text_field = list(paths), text_field
        if part[1] <= self.parts:
            self.paths = self.paths[part[0] :: part[1]]
        self.sizes = [path.stat().st_size for path in self.paths]
        self.token_bytes = sum(
            size * TOKEN_BYTES_PER_FILE_BYTE[path.suffix] for path, size in zip(self.paths, self.sizes, strict=True)
        )

    def documents(self, position: Any = None) -> Iterator[Document]:
        first, inside = position or (0, None)
        total = sum(self.sizes) or 1
        for index in range(first, len(self.paths)):
            path = self.paths[index]
            read = {".txt": _text, ".md": _text, ".parquet": _parquet}.get(path.suffix, _json_lines)
            for document in read(path, self.text_field, inside if index == first else None):
                document.position = (index, document.position)
                document.done = (sum(self.sizes[:index]) + (document.done or 0) * self.sizes[index]) / total
                yield document


def _text(path: Path, text_field: str, position: Any) -> Iterator[Document]:
    if position is None:
        yield Document(path, None, "read", 1.0)


def _json_lines(path: Path, text_field: str, position: int | None) -> Iterator[Document]:
    """One document a line. Our own reading rather than `datasets`': theirs fails a whole block for one bad line."""
    size = path.stat().st_size
    with open(path, "rb") as raw:
        try:
            lines: Any = raw
            if path.suffix in COMPRESSION:
                import pyarrow

                lines = io.BufferedReader(pyarrow.input_stream(raw, compression=COMPRESSION[path.suffix]), 2**20)
            start = position or 0
            at = 0 if path.suffix in COMPRESSION else lines.seek(start)
            while at < start:
                at += len(lines.read(min(2**20, start - at)))
            for line in lines:
                at += len(line)
                text, skipped = _line_text(line, text_field)
                del line  # it may be large, and the document is about to be worked on
                yield Document(text, skipped, at, raw.tell() / size)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} cannot be read to its end ({error}); it is damaged: copy it again") from error


def _line_text(line: bytes, text_field: str) -> tuple[bytes | memoryview, str | None]:
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


def _long_line_text(line: bytes, text_field: str) -> tuple[bytes | memoryview, str | None]:
    import pyarrow
    from pyarrow import json as arrow_json

    table = arrow_json.read_json(
        pyarrow.BufferReader(line),
        arrow_json.ReadOptions(use_threads=False, block_size=len(line) + 1),
        arrow_json.ParseOptions(pyarrow.schema([(text_field, pyarrow.string())]), unexpected_field_behavior="ignore"),
    )
    text = table[text_field][0].as_buffer()
    return (b"", NOT_TEXT) if text is None else (memoryview(text), None)


def _parquet(path: Path, text_field: str, position: Any) -> Iterator[Document]:
    import datasets

    stream = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    yield from _arrow_documents(stream, text_field, position, str(path))


def _arrow_documents(stream: Any, text_field: str, position: Any, name: str) -> Iterator[Document]:
    """The documents of a streaming `datasets` dataset; the position is its own state and the rows done since."""
    import pyarrow

    stream = stream.with_format("arrow")
    done = 0
    if position:
        stream.load_state_dict(position["state"])
        done = position["rows"]
    state = stream.state_dict()
    for table in stream.iter(batch_size=256):
        if text_field not in table.column_names:
            raise ValueError(
                f"{name} has no field {text_field!r}, only {table.column_names}; name it with --text-field"
            )
        column = table[text_field]
        if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
            raise ValueError(f"{name}: the field {text_field!r} is {column.type}, expected text; name another")
        for row, value in islice(enumerate(column), done, None):
            text = value.as_buffer()  # without a copy, and without a check for UTF-8: prepare checks and counts
            skipped = NOT_TEXT if text is None else None
            yield Document(memoryview(text or b""), skipped, {"state": state, "rows": row + 1})
        state, done = stream.state_dict(), 0


class HubDataset(Source):
    """A dataset of the Hub, or a local folder laid out like one, streamed by `datasets` at one fixed commit."""

    def __init__(
        self,
        dataset: str,
        *,
        config: str | None = None,
        split: str = "train",
        text_field: str = "text",
        revision: str | None = None,
        part: tuple[int, int] = (0, 1),
        offline: str = "*.parquet",
        **options: Any,
    ) -> None:
        import datasets
        from huggingface_hub import HfApi

        name = options.get("data_files", dataset)
        try:
            if not Path(dataset).is_dir() and not options:
                revision = HfApi().dataset_info(dataset, revision=revision, timeout=10).sha
            self.stream = datasets.load_dataset(
                dataset, name=config, split=split, revision=revision, streaming=True, **options
            )
        except Exception as error:  # each layer below has its own: http client, hub, file system, builder
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"the dataset {name} cannot be opened ({reason}). Without a network: --source files --files {offline} "
                "for files that are here, --source hub --dataset FOLDER for a downloaded repository, or --source "
                "python-docs, which needs nothing"
            ) from error
        record = {"name": "hub", "dataset": Path(dataset).name if Path(dataset).is_dir() else name, "config": config,
                  "split": split, "text_field": text_field, "revision": revision}  # fmt: skip
        super().__init__(record, parts=self.stream.num_shards, one_document="data_files" in options)
        if 1 < part[1] <= self.parts:
            self.stream = self.stream.shard(num_shards=part[1], index=part[0])
        self.name, self.text_field = name, text_field
        if config and config.startswith("sample-") and config.endswith("BT"):
            self.token_bytes = int(config[7:-2]) * 2e9 / part[1]  # the name counts GPT-2 tokens in billions

    def documents(self, position: Any = None) -> Iterator[Document]:
        return _arrow_documents(self.stream, self.text_field, position, self.name)
