"""What a run trains on is what its dataset records: contents, source, tokenizer, split; and one process decides it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from gpt2repro.data import hashes
from gpt2repro.data.prepare import prepare
from gpt2repro.data.training_data import open_recipe_dataset
from gpt2repro.recipe import Recipe
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def remembered(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gpt2repro" / "sha256.json"


@pytest.fixture
def read_files(monkeypatch) -> list[str]:
    """The names of the files that were read for their hash."""
    names: list[str] = []
    real = hashes.file_sha256
    monkeypatch.setattr(hashes, "file_sha256", lambda path: names.append(Path(path).name) or real(path))
    return names


@pytest.fixture
def dataset_copy(dataset_folder, tmp_path) -> Path:
    return shutil.copytree(dataset_folder, tmp_path / "dataset")


def opened(folder: Path, **fields):
    return open_recipe_dataset(Recipe(dataset_dir=(str(folder),), **fields))


def replace_keeping_times(path: Path, content: bytes) -> None:
    """Another file of the same size, time of change and name, as cp -p and rsync -t leave it."""
    status = path.stat()
    assert len(content) == status.st_size
    other = path.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shard_replaced_by_another_of_its_size_is_refused(dataset_copy, split):
    opened(dataset_copy)
    shard = dataset_copy / f"{split}-00000.npy"
    content = shard.read_bytes()
    replace_keeping_times(shard, content[:-2] + content[:2])
    with pytest.raises(ValueError, match=rf"{split}-00000\.npy has the sha256 .*, recorded is .*: copy or prepare"):
        opened(dataset_copy)


def test_two_shards_in_each_others_place_are_refused(dataset_copy):
    opened(dataset_copy)
    for old, new in (("train-00000", "aside"), ("train-00001", "train-00000"), ("aside", "train-00001")):
        os.replace(dataset_copy / f"{old}.npy", dataset_copy / f"{new}.npy")
    with pytest.raises(ValueError, match=r"train-00000\.npy has the sha256"):
        opened(dataset_copy)


def test_a_foreign_shard_replaced_by_another_of_its_size_is_another_dataset(dataset_folder, tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name in "train", "val":
        np.arange(500, dtype=np.uint16).tofile(folder / f"{name}.bin")
    fields = {"dataset_format": "nanogpt", "tokenizer": str(dataset_folder)}
    first = opened(folder, **fields).fingerprint
    assert opened(folder, **fields).fingerprint == first
    replace_keeping_times(folder / "train.bin", np.arange(1, 501, dtype=np.uint16).tobytes())
    assert opened(folder, **fields).fingerprint != first


def test_a_file_is_read_for_its_hash_once_and_again_after_it_changed(dataset_copy, read_files, remembered):
    names = sorted(path.name for path in dataset_copy.glob("*.npy"))
    opened(dataset_copy)
    assert sorted(read_files) == names
    opened(dataset_copy)
    os.utime(dataset_copy / "val-00000.npy")
    opened(dataset_copy)
    assert sorted(read_files) == sorted([*names, "val-00000.npy"])
    remembered.write_text('{"a": 3}')
    opened(dataset_copy)
    assert len(read_files) == 2 * len(names) + 1


def test_a_prepared_dataset_is_not_read_again(corpus, tmp_path, read_files):
    files = [str(corpus)]
    out = prepare(source="files", files=files, tokenizer="train:300", out=tmp_path / "out", shard_tokens=40_000)
    before = len(read_files)
    opened(out, source="files", files=tuple(files), tokenizer="train:300")
    assert read_files[before:] == []


def test_a_source_file_with_other_text_of_the_same_size_is_another_source(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The one text of this file. " * 300)
    fields = {"source": "files", "files": (str(text),), "tokenizer": "train:262"}
    out = prepare(source="files", files=[str(text)], tokenizer="train:262", out=tmp_path / "out")
    opened(out, **fields)
    replace_keeping_times(text, text.read_bytes().replace(b"one", b"two"))
    with pytest.raises(ValueError, match="was made from"):
        opened(out, **fields)
    with pytest.raises(ValueError, match="holds another preparation"):
        prepare(source="files", files=[str(text)], tokenizer="train:262", out=out)


def test_a_dataset_of_before_its_files_had_hashes_is_compared_by_their_sizes(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The one text of this file. " * 300)
    out = prepare(source="files", files=[str(text)], tokenizer="train:262", out=tmp_path / "out")
    record = json.loads((out / "dataset.json").read_text())
    del record["sha256"], record["source"]["files"][0]["sha256"]
    (out / "dataset.json").write_text(json.dumps({**record, "format_version": 1}))
    fields = {"source": "files", "files": (str(text),), "tokenizer": "train:262"}
    assert opened(out, **fields).split("train").tokens == record["splits"]["train"]["tokens"]
    assert prepare(source="files", files=[str(text)], tokenizer="train:262", out=out) == out


def test_a_tokenizer_of_the_same_size_is_compared_by_what_it_does(dataset_copy, dataset_folder, tmp_path):
    other = shutil.copytree(dataset_folder, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(ValueError, match=r"tokenizer is .*other, but .* has another one"):
        opened(dataset_copy, tokenizer=str(other))


def test_a_tokenizer_that_cannot_be_compared_is_said(corpus, dataset_folder, tmp_path, capsys):
    out = prepare(source="files", files=[str(corpus)], tokenizer=str(dataset_folder), out=tmp_path / "out")
    capsys.readouterr()
    opened(out, tokenizer="no/such-tokenizer")
    assert "warning: " in (said := capsys.readouterr().out) and "no/such-tokenizer, which cannot be compared" in said


def test_a_validation_split_of_another_size_is_refused(corpus, tmp_path):
    files = [str(corpus)]
    out = prepare(source="files", files=files, tokenizer="train:300", out=tmp_path / "out", val_tokens=2000)
    opened(out, val_tokens=2000)
    with pytest.raises(ValueError, match=r"split is \{'tokens': 3000\}, but .* was made with \{'tokens': 2000\}"):
        opened(out, val_tokens=3000)


# ---- several processes -----------------------------------------------------------------------------------------


@pytest.fixture
def shortsighted(tmp_path) -> Path:
    """The script, in which process 1 does not see the files that $UNSEEN names, as on a slow shared disk."""
    script = tmp_path / "shortsighted.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train_accelerate\n"
        "from pathlib import Path\n"
        "real = Path.exists\n"
        "if os.environ['RANK'] == '1':\n"
        "    Path.exists = lambda self, **kwargs: self.name != os.environ['UNSEEN'] and real(self, **kwargs)\n"
        "sys.exit(train_accelerate.main())\n"
    )
    return script


def test_one_process_decides_whether_a_dataset_and_a_run_are_there(train_script, shortsighted, tmp_path):
    for unseen, steps in (("dataset.json", 3), ("run.json", 6), ("metrics.jsonl", 8)):
        env = {"UNSEEN": unseen}
        train_script(tmp_path / "run", processes=2, script=shortsighted, env=env, max_steps=8, save_every=steps)


def test_a_shard_that_one_process_does_not_see_is_an_error_on_all(train_script, shortsighted, tmp_path):
    env = {"UNSEEN": "val-00000.npy"}
    output = train_script(tmp_path / "run", processes=2, script=shortsighted, env=env, exit_code=1)
    assert "error: " in output and output.count("val-00000.npy is missing") == 2
    assert not (tmp_path / "run").exists()
