"""Sources: every format gives the same documents, reports unusable records, and continues after any document."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gpt2repro.data.sources import Document, Source, open_source

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"Document {index}: naïve, 東京, 🙂\n" + "word " * (index % 7) for index in range(700)]


def write_lines(path: Path, lines: list[bytes]) -> Path:
    content = b"\n".join(lines) + b"\n"
    if path.suffix == ".gz":
        content = gzip.compress(content[:5000]) + gzip.compress(content[5000:])  # two members, as cat leaves them
    elif path.suffix == ".zst":
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        content = sink.getvalue().to_pybytes()
    path.write_bytes(content)
    return path


def write(path: Path, texts: list[str]) -> Path:
    if path.suffix == ".parquet":
        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=100)
        return path
    return write_lines(path, [json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0).encode() for text in texts])


def hub_folder(folder: Path) -> Path:
    """A downloaded repository of the Hub: a README that names the configurations, and parquet parts."""
    (folder / "sample-10BT").mkdir(parents=True)
    for part in range(3):
        write(folder / "sample-10BT" / f"{part:03d}_00000.parquet", TEXTS[part * 250 : part * 250 + 250])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample-10BT/*\n---\n"
    )
    return folder


def text_of(document: Document) -> str:
    return (document.text.read_bytes() if isinstance(document.text, Path) else bytes(document.text)).decode()


def texts_of(source: Source) -> list[str]:
    return [text_of(document) for document in source.documents()]


@pytest.fixture(params=["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt", "hub"])
def open_kind(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Source]:
    kind = request.param
    if kind == "hub":
        folder = hub_folder(tmp_path / "repository")
        return lambda: open_source("hub", dataset=str(folder), config="sample-10BT")
    if kind == "txt":
        for index in range(30):
            (tmp_path / f"{index:03d}.txt").write_text(TEXTS[index], "utf-8")
    else:
        write(tmp_path / f"a.{kind}", TEXTS[:400])
        write(tmp_path / f"b.{kind}", TEXTS[400:])
    return lambda: open_source("files", files=[str(tmp_path / f"*.{kind}")])


def test_every_kind_continues_after_any_document(open_kind: Callable[[], Source]) -> None:
    documents = list(open_kind().documents())
    everything = [text_of(document) for document in documents]
    assert everything == TEXTS[: len(everything)] and len(everything) in (30, 700)
    for index in (0, 10, 29, 255, 256, 399, 400, 698, len(documents) - 1):
        if index < len(documents):
            position = json.loads(json.dumps(documents[index].position))  # as state.json keeps it
            rest = [text_of(document) for document in open_kind().documents(position)]
            assert rest == everything[index + 1 :], index


def test_records_without_text_come_with_the_reason(tmp_path: Path) -> None:
    lines = [b'{"text": "good"}', b"", b'{"text": ""}', b'{"text": 5}', b'{"text": null}', b'{"body": "x"}', b"[1]",
             b'{"text": "cut', b'{"text": "\xff\xfe"}', b'{"text": "\\ud83d"}', b'{"text": "last"}']  # fmt: skip
    path = write_lines(tmp_path / "mixed.jsonl", lines)
    found = [(bytes(d.text), d.skipped) for d in open_source("files", files=[str(path)]).documents()]
    no_text, no_utf8 = (b"", "not_text"), (b"", "not_utf8")
    empty = (b"", None)  # prepare counts these
    assert found == [(b"good", None), empty, empty, *[no_text] * 5, no_utf8, no_utf8, (b"last", None)]


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (b"[1, 2]", r"a\.jsonl, line 2 is no JSON object, but b'\[1, 2\]"),
        (b'"text"', "line 2 is no JSON object"),
        (b"To be, or not to be", "line 2 is no JSON object"),
        (b"\x00" * 100, "line 2 is no JSON object"),
        (b"[" * 100_000, "line 2 is no JSON object"),
        (b'{"text": [1, 2]}', "line 2 has no text in a field 'text', only {'text': 'list'}; name it with"),
        (b'{"text": 5, "body": "x"}', "only {'text': 'int', 'body': 'str'}"),
        (b'{"body": "x"}', "only {'body': 'str'}"),
    ],
)
def test_a_file_that_is_no_text_from_its_first_record_on_is_refused_there(
    tmp_path: Path, first: bytes, message: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [b"", first, b'{"text": "good"}'])
    with pytest.raises(ValueError, match=message):
        list(open_source("files", files=[str(path)]).documents())


def test_what_a_text_may_hold_is_its_text(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [b'\xef\xbb\xbf{"text": "with a mark"}', b'{"text": "a\\u0000b\\r\\n"}'])
    assert texts_of(open_source("files", files=[str(path)])) == ["with a mark", "a\x00b\r\n"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [(b"[" * 2**25, "not_text"), (b" " * 2**25, None), (b'{"a": ' * 2**22, "not_text"), (b"\x00" * 2**25, "not_text")],
)
def test_a_long_line_without_text_is_a_record_without_text(tmp_path: Path, line: bytes, reason: str | None) -> None:
    path = write_lines(tmp_path / "a.jsonl", [b'{"text": "good"}', line, b'{"text": "last"}'])
    found = [(bytes(d.text), d.skipped) for d in open_source("files", files=[str(path)]).documents()]
    assert found == [(b"good", None), (b"", reason), (b"last", None)]


def test_null_and_undecodable_parquet_values_are_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "odd.parquet"
    values = pyarrow.array([b"good", None, b"\xff\xfe", b"last"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)
    found = [(bytes(d.text), d.skipped) for d in open_source("files", files=[str(path)]).documents()]
    assert found == [(b"good", None), (b"", "not_text"), (b"\xff\xfe", None), (b"last", None)]


def test_a_line_too_long_for_a_python_string_reads_the_same(tmp_path: Path) -> None:
    text = '"quoted" \\ 🙂 naïve\n' * 1_000_000
    lines = [
        json.dumps({"id": 1, "text": text}).encode(),
        b'{"text": 5, "x": "' + b"y" * 2**24 + b'"}',
        b'{"text": "z"}',
    ]
    path = write_lines(tmp_path / "long.jsonl", lines)
    found = [(bytes(d.text).decode(), d.skipped) for d in open_source("files", files=[str(path)]).documents()]
    assert found[0] == (text, None)
    assert found[1:] == [("", "not_text"), ("z", None)]


def test_python_docs_is_real_english_and_the_same_every_time() -> None:
    one, two = open_source("python-docs"), open_source("python-docs")
    assert one.record == two.record and one.record["python"] == sys.version.split()[0].rstrip("+")
    texts = texts_of(one)
    assert len(texts) == len(set(texts)) > 1500 and sum(map(len, texts)) > 1_000_000
    assert any("assert" in text and "__debug__" in text for text in texts)
    assert [text_of(document) for document in two.documents(1000)] == texts[1000:]


@pytest.mark.parametrize("cut", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_file_that_ends_early_or_has_another_content_is_an_error_with_its_name(tmp_path: Path, cut: str) -> None:
    path = write(tmp_path / f"cut.{cut}", TEXTS)
    for content in path.read_bytes()[:-20], b"To be, or not to be" * 9:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"cut\.{cut} cannot be read to its end"):
            list(open_source("files", files=[str(path)]).documents())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "wikitext"}, "unknown source 'wikitext': one of python-docs, files, text, hub"),
        ({"name": "files"}, "--source files and --files GLOB go together"),
        ({"name": "files", "files": ["nothing/*.jsonl"]}, r"no file matches 'nothing/\*.jsonl'"),
        ({"name": "files", "files": [str(ROOT)]}, "no file matches .*; give a file, or a glob"),
        ({"name": "files", "files": [__file__]}, r"test_sources.py is of no known kind: .txt, .md, .jsonl"),
        ({"name": "hub"}, "--source hub and --dataset NAME go together"),
        ({"name": "python-docs", "revision": "main"}, "mean nothing to source python-docs"),
        ({"name": "python-docs", "dataset": "x"}, "--source hub and --dataset NAME go together"),
    ],
)
def test_an_impossible_source_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(options.pop("name"), **options)


def test_a_parquet_file_without_the_field_names_those_it_has(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", TEXTS[:5])
    with pytest.raises(ValueError, match=r"no text in a field 'body', only .*; name it with --text-field"):
        list(open_source("files", files=[str(path)], text_field="body").documents())
    with pytest.raises(ValueError, match=r"no text in a field 'id', only \{'id': 'int64'"):
        list(open_source("files", files=[str(path)], text_field="id").documents())


@pytest.mark.parametrize("source", ["fineweb-edu", "openwebtext", "tinyshakespeare"])
def test_without_a_network_a_hub_source_fails_in_seconds_and_names_the_alternatives(source: str) -> None:
    program = f"""
import time
import datasets, huggingface_hub  # how long an import takes says nothing about the network
from gpt2repro.data.sources import open_source
began = time.monotonic()
try:
    open_source({source!r})
finally:
    print(time.monotonic() - began)
"""
    # A proxy that nobody answers at: the same refusal on machines that do have a network.
    dead = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    run = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **dead}, cwd=ROOT, capture_output=True, text=True
    )
    assert float(run.stdout) < 30
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: the dataset ") and "cannot be opened" in last
    assert "--source files" in last and "--dataset FOLDER" in last and "python-docs" in last


@pytest.mark.parametrize("name", ["a[1].jsonl", "b*?.parquet", "c[!d].txt"])
def test_a_name_of_an_existing_file_or_folder_is_no_pattern(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "texts [v1] *"
    folder.mkdir()
    if name.endswith(".txt"):
        (folder / name).write_text(TEXTS[0], "utf-8")
    else:
        write(folder / name, TEXTS[:1])
    for pattern in folder / name, folder / f"*{Path(name).suffix}", folder / "**" / f"*{Path(name).suffix}":
        assert texts_of(open_source("files", files=[str(pattern)])) == TEXTS[:1]


def test_a_local_repository_whose_name_is_a_pattern_is_refused(tmp_path: Path) -> None:
    for name in ("repository [1]", "repository 1"):
        hub_folder(tmp_path / name)
    with pytest.raises(ValueError, match=r"in .*repository \[1\] as a pattern: rename the folder"):
        open_source("hub", dataset=str(tmp_path / "repository [1]"), config="sample-10BT")


def test_a_glob_lists_files_in_the_order_of_their_whole_names(tmp_path: Path) -> None:
    names = ["a-b/1.txt", "a/2.txt", "a/b/3.txt", "b.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(open_source("files", files=[str(tmp_path / "b.txt"), str(tmp_path / "**/*.txt")])) == [
        "b.txt", "a-b/1.txt", "a/2.txt", "a/b/3.txt"
    ]


def test_the_home_folder_is_expanded_in_files_and_local_repositories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", TEXTS[:3])
    hub_folder(tmp_path / "repository")
    assert texts_of(open_source("files", files=["~/*.jsonl"])) == TEXTS[:3]
    assert texts_of(open_source("files", files=["~/a.jsonl"])) == TEXTS[:3]
    source = open_source("hub", dataset="~/repository", config="sample-10BT")
    assert texts_of(source) == TEXTS and source.record["dataset"] == "repository"


def test_parts_divide_files_between_them(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "repository")
    for number in range(5):
        write(tmp_path / f"{number}.jsonl", TEXTS[number * 100 : number * 100 + 100])
    for options, count in (
        ({"name": "files", "files": [str(tmp_path / "*.jsonl")]}, 500),
        ({"name": "hub", "dataset": str(folder), "config": "sample-10BT"}, 700),
    ):
        parts = [texts_of(open_source(part=(index, 3), **options)) for index in range(3)]
        assert sorted(text for part in parts for text in part) == sorted(TEXTS[:count]) and all(parts)
