"""Token shards: one stream from many files, foreign formats in place, and errors for damaged files."""

import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from gpt2repro.data.shards import open_dataset, tokenizer_sha256
from gpt2repro.data.stream import Shard, TokenStream
from gpt2repro.tools.inspect import main as inspect

IDS = np.random.default_rng(0).integers(0, 50257, 4321)


def test_many_shards_read_as_one_circular_stream(write_dataset: Callable[..., Path]) -> None:
    stream = open_dataset(write_dataset(IDS)).split("train")
    assert stream.tokens == len(IDS) and len(stream.shards) == 5
    random = np.random.default_rng(1)
    for start, count in [(0, 4321), (4320, 2), (999, 2), (4000, 9000), *random.integers(1, 4321, (200, 2)).tolist()]:
        assert np.array_equal(stream.read(start, count), IDS[(start + np.arange(count)) % 4321])


def test_a_stream_reads_the_same_where_files_have_no_pread(write_dataset: Callable[..., Path], monkeypatch) -> None:
    monkeypatch.delattr("os.pread")  # Windows
    stream = open_dataset(write_dataset(IDS)).split("train")
    assert np.array_equal(stream.read(4000, 900), np.resize(IDS, 9000)[4000:4900])


def test_shards_are_npy_files_that_numpy_reads(write_dataset: Callable[..., Path]) -> None:
    folder = write_dataset(IDS)
    assert np.array_equal(np.concatenate([np.load(path) for path in sorted(folder.glob("train-*.npy"))]), IDS)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_ids_take_two_bytes_while_they_fit(write_dataset: Callable[..., Path], vocab_size: int, dtype: str) -> None:
    ids = np.array([0, vocab_size - 1, 7])
    stream = open_dataset(write_dataset(ids, vocab_size=vocab_size)).split("train")
    assert stream.dtype == dtype and stream.read(0, 3).tolist() == ids.tolist()


def test_several_folders_are_one_stream_per_split(write_dataset: Callable[..., Path]) -> None:
    one, two = write_dataset(IDS[:1500], IDS[:10]), write_dataset(IDS[1500:])
    both = open_dataset([one, two])
    assert np.array_equal(both.split("train").read(1490, 20), IDS[1490:1510])
    assert both.split("train").tokens == 4321
    assert both.split("val").tokens == 10
    assert pickle.loads(pickle.dumps(both)).split("val").tokens == 10  # as other processes get it
    assert both.fingerprint not in (open_dataset(one).fingerprint, open_dataset([two, one]).fingerprint)


def test_folders_of_different_tokenizers_are_refused(write_dataset: Callable[..., Path]) -> None:
    one, two = write_dataset(IDS), write_dataset(IDS)
    record = json.loads((two / "dataset.json").read_text())
    (two / "dataset.json").write_text(json.dumps({**record, "tokenizer_sha256": "other"}))
    with pytest.raises(ValueError, match="another tokenizer"):
        open_dataset([one, two])


def test_a_missing_split_is_an_error_that_names_the_others(write_dataset: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"no split 'val', only \['train'\].*--val-tokens"):
        open_dataset(write_dataset(IDS)).split("val")


def _truncate(folder: Path) -> None:
    with open(folder / "train-00002.npy", "r+b") as file:
        file.truncate(1001)


def _change_header(folder: Path) -> None:
    np.save(folder / "train-00002.npy", IDS[:500].astype(np.uint32))  # 128 + 2,000 bytes: only the header tells


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "dataset.json").unlink(), "no dataset.json|neither dataset.json"),
        (lambda folder: (folder / "dataset.json").write_text('{"format_version": 1'), "dataset.json is broken"),
        (lambda folder: (folder / "dataset.json").write_text('{"format_version": 1}'), "broken .*vocab_size"),
        (lambda folder: (folder / "dataset.json").write_text('{"format_version": 9}'), "has version 9, not 2"),
        (lambda folder: (folder / "train-00002.npy").unlink(), r"train-00002.npy is missing"),
        (_truncate, r"train-00002.npy is truncated: 1,001 bytes, expected 2,128"),
        (_change_header, r"train-00002.npy has another header"),
        (lambda folder: shutil.rmtree(folder), "does not exist; prepare it"),
    ],
)
def test_a_damaged_dataset_is_refused_when_it_is_opened(
    write_dataset: Callable[..., Path], damage: Callable[[Path], None], message: str
) -> None:
    folder = write_dataset(IDS)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        open_dataset(folder, format="auto")


def test_verify_finds_one_changed_bit_that_opening_cannot_see(
    dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(dataset_folder, tmp_path / "copy")
    assert inspect([str(folder), "--verify"]) == 0
    assert "every sha256 is as recorded" in capsys.readouterr().out
    content = bytearray((folder / "train-00003.npy").read_bytes())
    content[5000] ^= 1
    (folder / "train-00003.npy").write_bytes(content)
    assert inspect([str(folder)]) == 0
    assert inspect([str(folder), "--verify"]) == 1
    assert "train-00003.npy: sha256" in capsys.readouterr().out


def test_inspect_prints_counts_and_first_lines_and_draws_lengths(
    dataset_folder: Path, tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect([str(dataset_folder), "--histogram", str(tmp_path / "lengths.png")]) == 0
    printed = capsys.readouterr().out
    info = open_dataset(dataset_folder).info
    for split in "train", "val":
        assert f"{split}: {info['splits'][split]['tokens']:,} tokens" in printed
        assert f"{info['splits'][split]['documents']:,} documents" in printed
    assert texts[0].splitlines()[0] in printed
    assert (tmp_path / "lengths.png").read_bytes()[:4] == b"\x89PNG"


def llmc_bytes(ids: np.ndarray, *, magic: int = 20240520, version: int = 1, tokens: int | None = None) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids) if tokens is None else tokens
    return header.tobytes() + ids.astype("<u2").tobytes()


def write_ds(path: Path, ids: np.ndarray, *, dtype: str = "<u2", tokenizer: str = "gpt2") -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(ids.astype(dtype).tobytes())
    Path(f"{path}.index").write_bytes(np.array([len(ids) // 2, len(ids)], "<u8").tobytes())
    Path(f"{path}.metadata").write_text(f"{tokenizer}|{dtype[-1]}\n{len(ids)}\n{len(ids)} T")


def write_foreign(folder: Path, kind: str) -> Path:
    """The same ids as each project's own script would leave them."""
    folder.mkdir()
    if kind == "build-nanogpt":
        np.save(folder / "edufineweb_val_000000.npy", IDS[:1000].astype(np.uint16))
        np.save(folder / "edufineweb_train_000001.npy", IDS[1000:3000].astype(np.uint16))
        np.save(folder / "edufineweb_train_000002.npy", IDS[3000:].astype(np.uint16))
    elif kind == "llm.c":
        (folder / "fineweb_val_000000.bin").write_bytes(llmc_bytes(IDS[:1000]))
        (folder / "fineweb_train_000001.bin").write_bytes(llmc_bytes(IDS[1000:3000]))
        (folder / "fineweb_train_000002.bin").write_bytes(llmc_bytes(IDS[3000:]))
    elif kind == "datatrove":
        write_ds(folder / "val_00000_unshuffled.ds", IDS[:1000])
        write_ds(folder / "000_train.ds", IDS[1000:3000])  # as the merger names them
        write_ds(folder / "001_train.ds", IDS[3000:])
        (folder / "train.ds.metadata").write_text("gpt2|2\n3321\n3.32 kT")
    else:
        IDS[:1000].astype(np.uint16).tofile(folder / "val.bin")
        IDS[1000:].astype(np.uint16).tofile(folder / "train.bin")
        (folder / "meta.pkl").write_bytes(b"")
    return folder


@pytest.mark.parametrize("kind", ["build-nanogpt", "llm.c", "nanogpt", "datatrove"])
def test_foreign_shards_are_read_in_place(tmp_path: Path, dataset_folder: Path, kind: str) -> None:
    folder = write_foreign(tmp_path / "foreign", kind)
    before = sorted(folder.iterdir())
    dataset = open_dataset(folder, format="nanogpt" if kind == "nanogpt" else "auto", tokenizer=str(dataset_folder))
    assert np.array_equal(dataset.split("val").read(0, 1000), IDS[:1000])
    assert np.array_equal(dataset.split("train").read(0, 3321), IDS[1000:])
    assert np.array_equal(dataset.split("train").read(3320, 2), IDS[[4320, 1000]])
    assert (dataset.vocab_size, dataset.eot_id) == (1024, 0)
    assert dataset.tokenizer_sha256 == open_dataset(dataset_folder).tokenizer_sha256
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("train.bin", llmc_bytes(IDS, magic=20240801), {}, r"begins with \[20240801, 1\], expected magic 20240520"),
        ("train.bin", llmc_bytes(IDS, version=2), {}, r"begins with \[20240520, 2\], expected .* version 1"),
        ("train.bin", llmc_bytes(IDS)[:-2], {}, "truncated: 9,664 bytes, expected 9,666"),
        ("train.bin", llmc_bytes(IDS) + b"xx", {}, "longer than its header"),
        ("train.bin", IDS.astype(np.uint16).tobytes(), {}, 'expected magic .*format "nanogpt"'),
        ("train.bin", b"", {}, r"begins with \[\], expected"),
        ("train.bin", b"abc", {"format": "nanogpt"}, "3 bytes, which is no whole number of uint16"),
        ("tokens.bin", llmc_bytes(IDS), {}, "'train' or 'val' in its name"),
        ("train.bin", llmc_bytes(IDS), {"tokenizer": None}, "does not say its tokenizer"),
        ("train.bin", llmc_bytes(IDS), {"tokenizer": "no/such/folder"}, "no tokenizer loads from 'no/such/folder'"),
        ("train.npy", b"\x93NUMPY garbage", {}, "no readable .npy"),
        ("train.bin", llmc_bytes(IDS), {"format": "megatron"}, "unknown format 'megatron'"),
        ("train.txt", b"To be", {}, r"neither dataset.json nor .npy, .bin or .ds"),
    ],
)
def test_foreign_shards_with_wrong_content_are_refused(
    tmp_path: Path, dataset_folder: Path, name: str, content: bytes, options: dict, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path, **{"tokenizer": str(dataset_folder), **options})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("000_train.ds", IDS[:1000].astype("<u2").tobytes() + b"x", "longer than its header says: 2,001 bytes"),
        ("000_train.ds", IDS[:999].astype("<u2").tobytes(), "truncated: 1,998 bytes, expected 2,000"),
        ("000_train.ds.index", np.array([500, 999], "<u8").tobytes(), "does not end at token 1,000"),
        ("000_train.ds.index", np.array([500, 1000], "<u8").tobytes()[:-3], "does not end at token 1,000"),
        ("000_train.ds.index", b"", "does not end at token 1,000"),
        ("000_train.ds.metadata", b"gpt2|4\n1000\n1 kT", "truncated: 2,000 bytes, expected 4,000"),
        ("000_train.ds.metadata", b"gpt2|8\n1000\n1 kT", "damaged .*expected TOKENIZER"),
        ("000_train.ds.metadata", b"gpt2|2", "damaged .*expected TOKENIZER"),
        ("000_train.ds.metadata", b"gpt2|2\n\xff", "damaged .*expected TOKENIZER"),
        ("000_train.ds.metadata", b"llama|2\n1000\n1 kT", r"several tokenizers \(gpt2, llama\)"),
        ("000_train.ds.metadata", None, "no 000_train.ds.metadata, which datatrove writes last"),
        ("000_train.ds.loss", b"\x01" * 1000, "takes the loss of some tokens away"),
        ("train.ds.metadata", b"gpt2|2\n3000\n3 kT", "records 3,000 tokens, but its shards have 1,000"),
    ],
)
def test_a_damaged_folder_of_datatrove_is_refused(
    tmp_path: Path, dataset_folder: Path, name: str, content: bytes | None, message: str
) -> None:
    write_ds(tmp_path / "000_train.ds", IDS[:1000])
    write_ds(tmp_path / "val.ds", IDS[:10])
    (tmp_path / name).unlink(missing_ok=True) if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path, tokenizer=str(dataset_folder))


def test_datatroves_folders_name_the_split_where_its_files_do_not(tmp_path: Path, dataset_folder: Path) -> None:
    write_ds(tmp_path / "train" / "00000_unshuffled.ds", IDS[:1000])
    write_ds(tmp_path / "validation" / "00000_unshuffled.ds", IDS[:10])
    write_ds(tmp_path / "tokenised" / "00000_unshuffled.ds", IDS[:1000])  # what the merger read
    dataset = open_dataset(tmp_path, tokenizer=str(dataset_folder))
    assert {name: stream.tokens for name, stream in dataset.streams.items()} == {"train": 1000, "val": 10}
    alone = open_dataset(tmp_path / "tokenised", tokenizer=str(dataset_folder))
    assert list(alone.streams) == ["train"]


def test_another_tokenizer_than_the_one_that_datatrove_recorded_is_refused(
    tmp_path: Path, dataset_folder: Path, tiny_dataset: Path
) -> None:
    write_ds(tmp_path / "train.ds", IDS % 512, tokenizer=str(tiny_dataset / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"another tokenizer than .*: leave the tokenizer out"):
        open_dataset(tmp_path, tokenizer=str(dataset_folder))


def test_datatroves_ids_are_of_the_size_that_their_tokenizer_needs(tmp_path: Path, dataset_folder: Path) -> None:
    write_ds(tmp_path / "train.ds", IDS, dtype="<u4", tokenizer=str(dataset_folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"holds uint32, but .* has 1,024 ids, which are uint16"):
        open_dataset(tmp_path)  # the tokenizer is the recorded one


def test_a_foreign_file_belongs_to_one_split(tmp_path: Path, dataset_folder: Path) -> None:
    (tmp_path / "interval_train_1.bin").write_bytes(llmc_bytes(IDS))
    assert list(open_dataset(tmp_path, tokenizer=str(dataset_folder)).streams) == ["train"]


def test_npy_shards_of_another_shape_or_type_are_refused(tmp_path: Path, dataset_folder: Path) -> None:
    for array in (IDS.astype(np.float32), IDS.astype(np.uint16).reshape(-1, 29)):
        np.save(tmp_path / "train.npy", array)
        with pytest.raises(ValueError, match=r"expected 1-D uint16 or uint32"):
            open_dataset(tmp_path, tokenizer=str(dataset_folder))


def test_the_tokenizer_hash_is_of_what_decides_ids_and_not_of_file_bytes(dataset_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(dataset_folder, tmp_path / "copy")
    content = json.loads((copy / "tokenizer.json").read_text("utf-8"))
    (copy / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    assert tokenizer_sha256(copy) == open_dataset(dataset_folder).tokenizer_sha256
    content["model"]["merges"][0], content["model"]["merges"][1] = content["model"]["merges"][1::-1]
    first, second = ("".join(merge) for merge in content["model"]["merges"][:2])
    vocab = content["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (copy / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    assert tokenizer_sha256(copy) != open_dataset(dataset_folder).tokenizer_sha256


def test_memory_does_not_grow_with_what_is_read_of_a_dataset(tmp_path: Path) -> None:
    shards = []
    for index in range(20):  # 4 GB, sparse
        path = tmp_path / f"train-{index:05d}.npy"
        with open(path, "wb") as file:
            file.truncate(128 + 2 * 10**8)
        shards.append(Shard(path, np.dtype("<u2"), 128, 10**8))
    stream = TokenStream(shards)
    stream.read(0, 1025)
    before = psutil.Process().memory_info().rss
    starts = np.random.default_rng(0).integers(0, stream.tokens, 20_000)
    began = time.process_time()  # not the clock on the wall: other programs may have the core
    for start in starts.tolist():
        stream.read(start, 1025)
    assert psutil.Process().memory_info().rss - before < 10_000_000
    assert 20_000 * 1024 / (time.process_time() - began) > 2_000_000  # a tenth of what an idle core does
