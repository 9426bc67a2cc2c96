"""Preparation: the same bytes for any number of workers and kills, and nothing is lost or skipped without a count."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import AutoTokenizer

from gpt2repro.data.prepare import main, prepare
from gpt2repro.data.shards import Dataset, open_dataset, read_record, write_record
from gpt2repro.data.training_data import open_recipe_dataset
from gpt2repro.files import file_sha256
from gpt2repro.recipe import Recipe
from tests.run.test_checkpoints import file_size_limit

ROOT = Path(__file__).resolve().parents[2]
Digests = Callable[[Path], dict[str, str]]
Capture = pytest.CaptureFixture[str]


def command(*arguments: str | Path | int) -> list[str]:
    return [sys.executable, "-m", "gpt2repro.data.prepare", *map(str, arguments)]


def decoded(dataset: Dataset, split: str) -> list[str]:
    """The documents of a split as text again."""
    tokenizer = AutoTokenizer.from_pretrained(dataset.tokenizer)
    stream = dataset.split(split)
    ids = stream.read(0, stream.tokens)
    documents = np.split(ids, np.flatnonzero(ids == dataset.eot_id))[1:]
    return [tokenizer.decode(document[1:].tolist()) for document in documents]


@pytest.fixture(scope="module")
def large_corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """About 6 MB in two files: some seconds of work."""
    folder = tmp_path_factory.mktemp("large")
    for file in range(2):
        lines = (json.dumps({"text": f"{file}.{copy} {text}"}) + "\n" for copy in range(6) for text in texts)
        (folder / f"{file}.jsonl").write_text("".join(lines), "utf-8")
    return folder


@pytest.fixture(scope="module")
def large_options(large_corpus: Path, dataset_folder: Path) -> list[str]:
    files = ["--source", "files", "--files", str(large_corpus / "*.jsonl"), "--shard-tokens", "150000"]
    return [*files, "--tokenizer", str(dataset_folder), "--val-fraction", "0.05"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, large_options: list[str]) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert main([*large_options, "--out", str(out)]) == 0
    return out


def test_every_document_is_in_one_split_whole_and_nothing_else_is(dataset_folder: Path, texts: list[str]) -> None:
    dataset = open_dataset(dataset_folder)
    train, val = decoded(dataset, "train"), decoded(dataset, "val")
    assert len(train) == dataset.info["splits"]["train"]["documents"] and len(train) > len(val) > 10
    assert sorted(train + val) == sorted(texts)
    assert train == [text for text in texts if text in set(train)], "in the order of the source"


def test_shards_are_byte_identical_for_any_number_of_workers(
    uninterrupted: Path, large_options: list[str], tmp_path: Path, folder_digests: Digests
) -> None:
    assert main([*large_options, "--out", str(tmp_path / "out"), "--workers", "3"]) == 0
    assert folder_digests(tmp_path / "out") == folder_digests(uninterrupted)


def test_a_trained_tokenizer_is_the_same_in_every_process(corpus: Path, dataset_folder: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        command("--source", "files", "--files", corpus, "--tokenizer", "train:1024", "--shard-tokens", 10_000,
                "--val-fraction", 0.05, "--out", tmp_path / "again", "--workers", 2),
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for name in "tokenizer.json", "dataset.json":
        assert (tmp_path / "again" / name).read_bytes() == (dataset_folder / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert tokenizer.is_fast and len(tokenizer) == 1024
    assert {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token} == {"<|endoftext|>"}
    text = "Any bytes \x00\x7f, 東京 🙂 and  spaces\n\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


# ------------------------------------------------------------------------------------------------ interruptions


def kill_until_done(arguments: list[str], out: Path, *, kills: int, seed: int, longest: float) -> int:
    """Start, SIGKILL after a random time, start again, until done or out of kills; how many there were."""
    chance, done = random.Random(seed), 0
    while True:
        process = subprocess.Popen(command(*arguments, "--out", out), cwd=ROOT, stderr=subprocess.PIPE)
        try:
            process.wait(timeout=None if done == kills else chance.uniform(0.3, longest))
            assert process.stderr is not None
            assert process.returncode == 0, process.stderr.read().decode()
            return done
        except subprocess.TimeoutExpired:
            workers = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
            _, alive = psutil.wait_procs(workers, timeout=60)  # some may be starting still
            assert not alive, "a worker outlived its killed main process"


@pytest.mark.parametrize("wanted", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_at_random_times_change_no_byte(
    uninterrupted: Path, large_options: list[str], tmp_path: Path, folder_digests: Digests, wanted: int
) -> None:
    kills = seed = 0
    while kills < wanted:  # a preparation may be over before its first kill: then another one is begun
        arguments = [*large_options, "--workers", str(1 + (seed + 1) % 3)]
        kills += kill_until_done(arguments, tmp_path / str(seed), kills=wanted - kills, seed=seed, longest=5.0)
        assert folder_digests(tmp_path / str(seed)) == folder_digests(uninterrupted), seed
        shutil.rmtree(tmp_path / str(seed))
        seed += 1
    print(f"{kills} kills over {seed} preparations")


def test_a_restart_does_not_read_again_what_is_done(
    uninterrupted: Path, large_corpus: Path, large_options: list[str], tmp_path: Path, folder_digests: Digests
) -> None:
    """Proved by spoiling the part of the input that is done: the result is the unspoiled one."""
    copy = shutil.copytree(large_corpus, tmp_path / "corpus")
    options = [*large_options, "--out", str(tmp_path / "out"), "--workers", "2"]
    options[options.index("--files") + 1] = str(copy / "*.jsonl")
    process = subprocess.Popen(command(*options), cwd=ROOT, stderr=subprocess.DEVNULL)
    state_file = tmp_path / "out" / ".preparing" / "state.json"
    while not (state_file.exists() and json.loads(state_file.read_text())["progress"]["position"]):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    state = read_record(state_file)
    file, (offset, _) = state["progress"]["position"]
    assert (file, offset) > (0, 100_000)
    with open(copy / "0.jsonl", "r+b") as first:
        first.write(b"x" * (offset if file == 0 else 2**20))
    state["settings"]["source"]["files"][0]["sha256"] = file_sha256(copy / "0.jsonl")  # or it would be another source
    write_record(state_file, state)
    assert main(options) == 0
    found, expected = folder_digests(tmp_path / "out"), folder_digests(uninterrupted)
    assert found.pop("dataset.json") != expected["dataset.json"]
    assert found.items() <= expected.items() and len(found) == len(expected) - 1


def test_a_full_disk_keeps_finished_shards_and_the_same_command_resumes(
    uninterrupted: Path, large_options: list[str], tmp_path: Path, folder_digests: Digests
) -> None:
    """A limit on the size of files, set while it runs, stands for the disk that fills up."""
    out = tmp_path / "out"
    process = subprocess.Popen(command(*large_options, "--out", out), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    state_file = out / ".preparing" / "state.json"
    while not (state_file.exists() and "train-00000.npy" in state_file.read_text()):  # that shard is never redone
        assert process.poll() is None
        time.sleep(0.005)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
    _, printed = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "File too large" in printed and "run the same command again" in printed
    with pytest.raises(ValueError, match="not finished: run the same command again"):
        open_dataset(out)
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("train-*.npy")}
    assert main([*large_options, "--out", str(out)]) == 0
    assert finished["train-00000.npy"] == (out / "train-00000.npy").stat().st_mtime_ns
    assert folder_digests(out) == folder_digests(uninterrupted)


def test_a_disk_that_is_full_for_the_tokenizer_is_one_error_and_the_same_command_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("The year 1984 had 366 days.\n" * 200)
    source = ["--source", "files", "--files", str(tmp_path / "text.txt"), "--val-tokens", "0"]
    options = [*source, "--tokenizer", "train:270"]
    with file_size_limit(500):
        assert main([*options, "--out", str(tmp_path / "out")]) == 1
    assert "File too large" in capsys.readouterr().err
    assert main([*options, "--out", str(tmp_path / "out")]) == 0


def test_a_killed_worker_is_an_error_that_says_how_to_resume(
    uninterrupted: Path, large_options: list[str], tmp_path: Path, folder_digests: Digests
) -> None:
    options = [*large_options, "--out", str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen(command(*options), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    workers: list[psutil.Process] = []
    while not workers:
        assert process.poll() is None
        with contextlib.suppress(psutil.Error):  # a child that ends while it is looked at
            children = psutil.Process(process.pid).children()
            workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        time.sleep(0.005)
    workers[0].kill()
    _, printed = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "error: preparing" in printed and "fewer --workers" in printed and "Traceback" not in printed
    assert main(options) == 0
    assert folder_digests(tmp_path / "out") == folder_digests(uninterrupted)


def test_what_an_older_version_began_is_refused_with_what_to_do(
    large_options: list[str], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / ".preparing").mkdir()
    state = {"settings": {}, "progress": {"position": None, "ordinal": 0}, "documents": {}, "shards": {}}
    (tmp_path / ".preparing" / "state.json").write_text(json.dumps(state))
    assert main([*large_options, "--out", str(tmp_path)]) == 1
    assert "state.json is broken (KeyError: 'format_version'); copy the folder, or delete" in capsys.readouterr().err


def test_a_disk_too_small_is_refused_at_the_start(tmp_path: Path, dataset_folder: Path, capsys: Capture) -> None:
    sparse = tmp_path / "huge.jsonl"
    with open(sparse, "wb") as file:
        file.truncate(4 * shutil.disk_usage(tmp_path).free)
    options = ["--source", "files", "--files", str(sparse), "--tokenizer", str(dataset_folder)]
    assert main([*options, "--out", str(tmp_path / "out")]) == 1
    assert "GB free, the shards need about" in capsys.readouterr().err


def test_a_finished_dataset_is_left_alone(
    uninterrupted: Path, large_options: list[str], folder_digests: Digests
) -> None:
    before, changed = folder_digests(uninterrupted), (uninterrupted / "dataset.json").stat().st_mtime_ns
    assert main([*large_options, "--out", str(uninterrupted)]) == 0
    assert (uninterrupted / "dataset.json").stat().st_mtime_ns == changed
    assert folder_digests(uninterrupted) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--shard-tokens", "77"], "shard_tokens is 150000, asked for 77"),
        (["--val-fraction", "0.5"], "validation is {'fraction': 0.05}, asked for {'fraction': 0.5}"),
        (["--part", "0/2"], "part is 0/1, asked for 0/2"),
        (["--files", __file__.replace(".py", ".md")], "no file matches"),
        (["--tokenizer", "train:600"], "tokenizer is"),
        (["--tokenizer", "no/such/tokenizer"], "no tokenizer loads from 'no/such/tokenizer'"),
        (["--tokenizer", "train:big"], "tokenizer 'train:big' with part 0/1: train:N takes a number"),
        (["--tokenizer", "train:600", "--part", "0/2"], "for parts, train on a sample first"),
        (["--workers", "0"], "must be at least 1"),
        (["--part", "2/2"], "the parts of 4 are 0/4, 1/4, 2/4 and 3/4"),
        (["--val-tokens", "5"], "two ways to one split"),
    ],
)
def test_other_settings_in_a_used_folder_and_impossible_settings_are_errors(
    uninterrupted: Path, large_options: list[str], change: list[str], message: str, capsys: Capture,
    folder_digests: Digests,
) -> None:  # fmt: skip
    before = folder_digests(uninterrupted)
    assert main([*large_options, "--out", str(uninterrupted), *change]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed
    assert folder_digests(uninterrupted) == before


def test_a_folder_that_holds_a_commit_of_the_hub_is_refused_for_another_source(tmp_path: Path) -> None:
    source = {"name": "hub", "dataset": "owner/texts", "revision": "0" * 40}
    record = {"format_version": 1, "splits": {}, "source": source}
    (tmp_path / "dataset.json").write_text(json.dumps(record), "utf-8")
    with pytest.raises(ValueError, match="holds another preparation"):
        prepare(source="python-docs", tokenizer="train:512", out=tmp_path)


def test_the_home_folder_is_expanded_in_every_path(
    tmp_path: Path, dataset_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("some text " * 100)
    shutil.copytree(dataset_folder, tmp_path / "tokenizer")
    made = prepare(source="files", files=["~/a.txt"], tokenizer="~/tokenizer", out="~/made", val_tokens=20)
    assert made == tmp_path / "made"
    recipe = Recipe(dataset_dir=("~/made",), source="files", files=("~/a.txt",), tokenizer="~/tokenizer")
    assert open_recipe_dataset(recipe).fingerprint == open_dataset("~/made").fingerprint


def test_wrong_usage_exits_with_2() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--source", "files"])
    assert stopped.value.code == 2


def test_a_folder_with_other_things_and_a_second_writer_are_refused(
    tmp_path: Path, large_options: list[str], capsys: Capture
) -> None:
    (tmp_path / "other.txt").write_text("other")
    assert main([*large_options, "--out", str(tmp_path)]) == 1
    assert "is not empty and holds no dataset" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]
    first = subprocess.Popen(command(*large_options, "--out", tmp_path / "out"), cwd=ROOT, stderr=subprocess.DEVNULL)
    state_file = tmp_path / "out" / ".preparing" / "state.json"
    while not state_file.exists():  # it is written under the lock; the lock's own file is there before it is taken
        assert first.poll() is None
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)  # so that it holds the lock however slow this process is
    assert state_file.exists()
    assert main([*large_options, "--out", str(tmp_path / "out")]) == 1
    assert "another process is preparing" in capsys.readouterr().err
    first.kill()
    first.wait()


# ------------------------------------------------------------------------------------------------ what is counted


def test_what_is_left_out_is_counted(tmp_path: Path, dataset_folder: Path, capsys: Capture) -> None:
    lines = [
        b'{"text": "one document"}',
        b'{"text": " \\n "}',
        b"",
        b'{"text": 5}',
        b'{"text": "\xff"}',
        b'{"text": "two"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"good at first " * 100_000 + b"\xff")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.txt").write_bytes(b"a whole file")
    out = prepare(
        source="files", files=[str(tmp_path / "*.jsonl"), str(tmp_path / "*.txt")], tokenizer=str(dataset_folder),
        out=tmp_path / "out", val_tokens=0,
    )  # fmt: skip
    dataset = open_dataset(out)
    assert dataset.info["skipped"] == {"empty": 3, "not_text": 1, "not_utf8": 2}
    assert decoded(dataset, "train") == ["one document", "two", "a whole file"]
    assert "'not_utf8': 2" in capsys.readouterr().err


def test_the_first_record_that_is_left_out_for_a_reason_is_named(
    tmp_path: Path, dataset_folder: Path, capsys: Capture
) -> None:
    lines = ['{"text": "good"}', '{"text": 5}', "[1]", '{"text": "\\ud800"}', '{"text": " "}'] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfA file with a byte order mark")
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")]
    out = prepare(source="files", files=files, tokenizer=str(dataset_folder), out=tmp_path / "out", val_tokens=0)
    said = [line for line in capsys.readouterr().err.splitlines() if ": skipped as" in line]
    assert [line.removeprefix(f"{tmp_path}/").split(";")[0] for line in said] == [
        "a.jsonl, line 2: skipped as not_text", "a.jsonl, line 4: skipped as not_utf8",
        "a.jsonl, line 5: skipped as empty",
    ]  # fmt: skip
    dataset = open_dataset(out)
    assert dataset.info["skipped"] == {"empty": 2, "not_text": 4, "not_utf8": 2}
    assert decoded(dataset, "train") == ["good", "good", "A file with a byte order mark"]


def test_what_is_left_out_after_the_last_checkpoint_is_counted_too(
    large_corpus: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(large_corpus / "0.jsonl", tmp_path / "0.jsonl")
    (tmp_path / "1.jsonl").write_text('{"text": null}\n\n')
    files = [str(tmp_path / "*.jsonl")]
    out = prepare(
        source="files", files=files, tokenizer=str(dataset_folder), out=tmp_path / "out", shard_tokens=150_000
    )
    assert open_dataset(out).info["skipped"] == {"empty": 1, "not_text": 1, "not_utf8": 0}


def test_text_that_spells_the_end_of_text_token_is_text(tmp_path: Path, dataset_folder: Path) -> None:
    (tmp_path / "a.txt").write_text("before <|endoftext|> after")
    dataset = open_dataset(
        prepare(source="files", files=[str(tmp_path / "a.txt")], tokenizer=str(dataset_folder), out=tmp_path / "out",
                val_tokens=0)
    )  # fmt: skip
    stream = dataset.split("train")
    ids = stream.read(0, stream.tokens)
    assert ids[0] == dataset.eot_id and (ids[1:] != dataset.eot_id).all()
    assert decoded(dataset, "train") == ["before <|endoftext|> after"]


@pytest.mark.parametrize("val_tokens", [1, 1000, 12_345])
def test_val_tokens_are_exactly_the_first_and_training_begins_after_them(
    corpus: Path, dataset_folder: Path, tmp_path: Path, val_tokens: int
) -> None:
    options = {"source": "files", "files": [str(corpus)], "tokenizer": str(dataset_folder)}
    whole = open_dataset(prepare(**options, out=tmp_path / "whole", val_tokens=0)).split("train")
    dataset = open_dataset(prepare(**options, out=tmp_path / "out", val_tokens=val_tokens, shard_tokens=5000))
    val, train = dataset.split("val"), dataset.split("train")
    ids = whole.read(0, whole.tokens)
    assert val.tokens == val_tokens and np.array_equal(val.read(0, val_tokens), ids[:val_tokens])
    rest = ids[val_tokens:] if ids[val_tokens] == dataset.eot_id else [dataset.eot_id, *ids[val_tokens:]]
    assert np.array_equal(train.read(0, train.tokens), rest)
    counted = [int((s.read(0, s.tokens) == dataset.eot_id).sum()) for s in (train, val)]
    assert [dataset.info["splits"][name]["documents"] for name in ("train", "val")] == counted


def test_no_training_tokens_is_an_error(corpus: Path, dataset_folder: Path, tmp_path: Path) -> None:
    options = {"source": "files", "files": [str(corpus)], "tokenizer": str(dataset_folder)}
    with pytest.raises(ValueError, match="no training tokens"):
        prepare(**options, out=tmp_path / "a", val_tokens=10**9)
    (tmp_path / "null.jsonl").write_text('{"text": null}\n' * 3)
    with pytest.raises(ValueError, match=r"'not_text': 3.*--text-field"):
        prepare(**{**options, "files": [str(tmp_path / "null.jsonl")]}, out=tmp_path / "b")


@pytest.mark.parametrize(("files", "parts"), [(1, 3), (4, 2)])
def test_parts_are_disjoint_and_their_union_is_the_whole(
    dataset_folder: Path, tmp_path: Path, texts: list[str], files: int, parts: int
) -> None:
    for file in range(files):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[file::files])
        (tmp_path / f"{file}.jsonl").write_text("".join(lines), "utf-8")
    options = {"source": "files", "files": [str(tmp_path / "*.jsonl")], "tokenizer": str(dataset_folder)}
    folders = [
        prepare(**options, out=tmp_path / f"part-{index}", part=f"{index}/{parts}", val_fraction=0.1)
        for index in range(parts)
    ]
    whole = open_dataset(folders)
    assert sorted(decoded(whole, "train") + decoded(whole, "val")) == sorted(texts)


def test_val_tokens_of_parts_come_from_the_first_part(corpus: Path, dataset_folder: Path, tmp_path: Path) -> None:
    folders = [
        prepare(source="files", files=[str(corpus)], tokenizer=str(dataset_folder), out=tmp_path / str(index),
                part=f"{index}/2", val_tokens=5000)
        for index in range(2)
    ]  # fmt: skip
    assert open_dataset(folders).split("val").tokens == 5000


def test_one_text_file_gives_about_its_first_tenth_to_validation(
    tmp_path: Path, dataset_folder: Path, texts: list
) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(texts), "utf-8")
    dataset = open_dataset(
        prepare(
            source="files", files=[str(tmp_path / "book.txt")], tokenizer=str(dataset_folder), out=tmp_path / "out"
        )
    )
    val, train = dataset.split("val").tokens, dataset.split("train").tokens
    assert 0.05 < val / (val + train) < 0.12


def test_the_record_holds_no_time_and_no_path_of_this_machine(uninterrupted: Path, dataset_folder: Path) -> None:
    for folder in uninterrupted, dataset_folder:
        content = "".join(path.read_text("utf-8") for path in folder.glob("*.json"))
        assert str(Path.home()) + os.sep not in content and str(folder.parent) not in content and "/tmp" not in content


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_document_of_200_mb_stays_within_the_memory_bound(
    dataset_folder: Path, tmp_path: Path, texts: list[str], workers: int
) -> None:
    text = "\n\n".join(texts) + "\n🙂\n"  # the emoji makes a Python string of it four bytes a character
    with open(tmp_path / "one.jsonl", "w", encoding="utf-8") as file:
        json.dump({"text": text * (200_000_000 // len(text))}, file, ensure_ascii=False)
    options = ["--source", "files", "--files", tmp_path / "one.jsonl", "--tokenizer", dataset_folder]
    process = psutil.Popen(
        command(*options, "--out", tmp_path / "out", "--workers", workers, "--val-tokens", 0), cwd=ROOT
    )
    most = 0
    while process.poll() is None:
        try:
            family = [process, *process.children(recursive=True)]
            most = max(most, sum(member.memory_info().rss for member in family))
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.05)
    assert process.returncode == 0
    assert most < 1e9 + workers * 300e6, f"{most / 1e6:.0f} MB"


# ------------------------------------------------------------------------------------------------ real inputs


def test_tinyshakespeare_is_338025_gpt2_tokens(shared_dir: Path, tmp_path: Path) -> None:
    dataset = open_dataset(
        prepare(source="files", files=[str(shared_dir / "tinyshakespeare" / "input.txt")], out=tmp_path / "out",
                tokenizer=str(shared_dir / "gpt2_tokenizer"), val_tokens=36_059)
    )  # fmt: skip
    splits = dataset.info["splits"].values()
    assert sum(split["tokens"] - split["documents"] for split in splits) == 338_025
    assert (dataset.vocab_size, dataset.eot_id) == (50257, 50256)


def test_the_corpus_validation_file_is_777720_gpt2_tokens(shared_dir: Path, tmp_path: Path) -> None:
    dataset = open_dataset(
        prepare(source="files", files=[str(shared_dir / "corpus" / "val.jsonl.zst")], out=tmp_path / "out",
                tokenizer=str(shared_dir / "gpt2_tokenizer"), val_fraction=0.1, workers=2)
    )  # fmt: skip
    splits = dataset.info["splits"].values()
    assert sum(split["documents"] for split in splits) == 437
    assert sum(split["tokens"] - split["documents"] for split in splits) == 777_720
