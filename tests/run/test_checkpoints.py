"""Checkpoints: damage to every file, a disk that is full at every write, kills."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from gpt2repro.recipe import Recipe
from gpt2repro.run.checkpoints import (
    RECORD,
    find_checkpoint,
    load_checkpoint,
    resume_from,
    save_checkpoint,
    verify_checkpoint,
)
from gpt2repro.train.optimizer import make_optimizer
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from tests.conftest import ROOT


class Training:
    """A tiny model after one step of AdamW, and what it takes to save and load it."""

    def __init__(self, tokenizer_dir: Path, *, seed: int = 0) -> None:
        transformers_logging.disable_progress_bar()  # as in a run: a captured bar is a file with a size, too
        torch.manual_seed(seed)
        self.model = GPT2ReproForCausalLM(
            GPT2ReproConfig(n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=512)
        )
        self.optimizer = make_optimizer(self.model, Recipe())
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        self.accelerator = Accelerator(cpu=True)
        self.take_step()

    def take_step(self) -> None:
        ids = torch.randint(512, (1, 16))
        self.model(ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parts(self) -> dict:
        names = ("model", "optimizer", "tokenizer", "accelerator")
        return {name: getattr(self, name) for name in names}

    def save(self, run_dir: Path, step: int, *, keep_last: int = 2) -> Path:
        run_dir.mkdir(exist_ok=True)
        state = {"tokens": step, "dataset_fingerprint": "f"}
        return save_checkpoint(run_dir, step, state=state, keep_last=keep_last, **self.parts())

    def load(self, checkpoint: Path) -> dict:
        return load_checkpoint(
            checkpoint, model=self.model, optimizer=self.optimizer, accelerator=self.accelerator
        )

    def tensors(self) -> list[torch.Tensor]:
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return [tensor.detach().clone() for tensor in [*self.model.parameters(), *moments]]

    def equals(self, tensors: list[torch.Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.tensors(), tensors, strict=True))


@pytest.fixture(scope="module")
def training(tiny_dataset) -> Training:
    return Training(tiny_dataset)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- damage --------------------------------------------------------------------------------------------------


def flip(file: Path, position: int = -1) -> None:
    changed = bytearray(file.read_bytes())
    changed[position] ^= 1
    file.write_bytes(changed)


DAMAGE = {
    "one bit flipped": flip,
    "cut in half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "missing": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_of_a_checkpoint_is_named_and_nothing_is_loaded_or_changed(
    training, tiny_dataset, tmp_path, damage
):
    whole = training.save(tmp_path / "run", 1)
    other = Training(tiny_dataset, seed=1)
    before = other.tensors()
    names = sorted(path.name for path in whole.iterdir())
    assert {"config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json", RECORD} < set(names)
    for name in names:
        checkpoint = shutil.copytree(whole, tmp_path / name / whole.name)
        DAMAGE[damage](checkpoint / name)
        damaged = content(checkpoint)
        assert find_checkpoint(checkpoint.parent, "auto") == checkpoint.resolve()
        with pytest.raises(ValueError, match=f"{checkpoint / name} .*--resume previous"):
            other.load(checkpoint)
        assert content(checkpoint) == damaged
        assert other.equals(before)
    other.load(whole)
    assert other.equals(training.tensors())


def test_a_bit_flipped_anywhere_in_the_record_is_found(training, tmp_path):
    record = training.save(tmp_path / "run", 1) / RECORD
    for position in range(0, record.stat().st_size, 3):  # so that every key and every value is hit
        flip(record, position)
        with pytest.raises(ValueError, match=f"{RECORD} (is damaged|cannot be read)"):
            verify_checkpoint(record.parent)
        flip(record, position)
    assert verify_checkpoint(record.parent)["step"] == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"step"', "{}", '{"sha256": 1}', "\x00" * 100])
def test_a_record_that_is_something_else_is_named(training, tmp_path, text):
    record = training.save(tmp_path / "run", 1) / RECORD
    record.write_text(text)
    with pytest.raises(ValueError, match=RECORD):
        verify_checkpoint(record.parent)


def test_a_checkpoint_of_a_format_to_come_is_refused(training, tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2repro.run.checkpoints.FORMAT_VERSION", 2)
    saved = training.save(tmp_path / "run", 1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is of format 2, this code reads 1"):
        training.load(saved)


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (lambda tensor: tensor[..., :1].contiguous(), r"1\] torch.float32, not \["),
        (lambda tensor: tensor.bfloat16(), r"\] torch.bfloat16, not \[.*\] torch.float32"),
    ],
    ids=["shape", "dtype"],
)
def test_an_optimizer_state_of_another_shape_or_type_is_refused(training, tmp_path, monkeypatch, change, kinds):
    def save_changed(tensors, path):
        save_file({name: change(tensor) if tensor.dim() else tensor for name, tensor in tensors.items()}, path)

    monkeypatch.setattr("gpt2repro.run.checkpoints.save_file", save_changed)
    saved = training.save(tmp_path / "run", 1)
    with pytest.raises(ValueError, match=f"optimizer.safetensors is not of this model: .* has shape .*{kinds}"):
        training.load(saved)


# ---- which one to resume from --------------------------------------------------------------------------------


def test_previous_is_the_one_before_the_newest_also_where_the_newest_lost_its_record(training, tmp_path):
    for step in (1, 2, 3):
        training.save(tmp_path, step, keep_last=0)
    (tmp_path / "step-00000003" / RECORD).unlink()
    assert find_checkpoint(tmp_path, "auto").name == "step-00000003"  # so that loading names it
    assert find_checkpoint(tmp_path, "previous").name == "step-00000002"


def test_folders_that_only_look_like_checkpoints_are_left_alone(training, tmp_path):
    training.save(tmp_path, 1)
    for name in ("step-00000009.bak", "step-9", "step-00000009-copy", "abandoned-step-00000009"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    assert find_checkpoint(tmp_path, "auto").name == "step-00000001"
    training.save(tmp_path, 2, keep_last=1)
    assert len(list(tmp_path.glob("*step-*9*"))) == 4


def test_a_run_that_starts_from_another_runs_checkpoint_again_renames_its_own(training, tmp_path):
    start = training.save(tmp_path / "other", 1)
    training.save(tmp_path / "run", 2)
    resume_from(tmp_path / "run", find_checkpoint(tmp_path / "run", str(start)), step=1)
    assert training.save(tmp_path / "run", 2).is_dir()
    assert (tmp_path / "run" / "abandoned-step-00000002" / RECORD).exists()


def test_resuming_deletes_what_a_kill_left_and_repairs_a_dangling_link(training, tmp_path):
    training.save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.tmp")
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("step-00000002")
    resume_from(tmp_path, find_checkpoint(tmp_path, "auto"), step=1)
    assert os.readlink(tmp_path / "latest") == "step-00000001"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_a_latest_that_copying_made_a_folder_is_named(training, tmp_path):
    training.save(tmp_path, 1)
    (tmp_path / "latest").unlink()
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "latest")
    with pytest.raises(ValueError, match=r"latest is a folder, where a link .* belongs: remove it"):
        resume_from(tmp_path, find_checkpoint(tmp_path, "auto"), step=1)


# ---- a save that fails ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def file_size_limit(limit: int):
    """No file of this process and those it starts may grow past `limit` bytes; Python ignores SIGXFSZ."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_only(run_dir: Path, checkpoint: Path, before: dict[str, bytes]) -> None:
    """The one checkpoint of a run is what it was, is what `auto` finds and `latest` points at."""
    assert [path.name for path in run_dir.glob("step-*")] == [checkpoint.name]
    assert content(checkpoint) == before
    assert find_checkpoint(run_dir, "auto") == checkpoint.resolve() == (run_dir / "latest").resolve()
    verify_checkpoint(checkpoint)


def test_a_file_that_cannot_grow_fails_the_save_and_leaves_the_checkpoint_before(training, tmp_path):
    first = training.save(tmp_path, 1, keep_last=1)
    before = content(first)
    sizes = sorted({len(data) for data in before.values()})
    for size in sizes:  # the first file of each size in turn is the one that fails
        with file_size_limit(size - 1), pytest.raises(ValueError, match=r"saving step 2 .* untouched"):
            training.save(tmp_path, 2, keep_last=1)
        assert_only(tmp_path, first, before)
    with file_size_limit(sizes[-1]):
        training.save(tmp_path, 2, keep_last=1)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000002"]


def test_a_disk_that_is_full_at_any_block_of_a_save_leaves_the_checkpoint_before(training, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    try:
        run_dir = disk / "run"
        first = training.save(run_dir, 1, keep_last=1)
        before = content(first)
        block, needed = os.statvfs(disk).f_bsize, 0
        with (disk / "filler").open("wb") as filler:
            while True:
                filler.truncate(0)
                os.posix_fallocate(filler.fileno(), 0, (os.statvfs(disk).f_bavail - needed) * block)
                try:
                    training.save(run_dir, 2, keep_last=1)
                    break
                except ValueError as error:
                    assert "saving step 2" in str(error) and "make room" in str(error)
                assert_only(run_dir, first, before)
                assert not list(run_dir.glob(".step-*"))
                needed += 1
        assert needed > sum(len(data) // block for data in before.values())  # every block was the one that failed
        assert [path.name for path in run_dir.glob("step-*")] == ["step-00000002"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_run_folder_that_was_taken_away_is_an_error_and_not_begun_anew(training, tmp_path):
    training.save(tmp_path / "run", 1)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"saving step 2 .*No such file or directory"):
        save_checkpoint(tmp_path / "run", 2, state={}, keep_last=2, **training.parts())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved_and_older_checkpoints_stay(tiny_dataset, tmp_path, value):
    training = Training(tiny_dataset)
    first = training.save(tmp_path, 1, keep_last=1)
    before = content(first)
    with torch.no_grad():
        training.model.transformer.h[0].mlp.c_fc.weight[3, 5] = value
    with pytest.raises(ValueError, match=r"step 2 is not saved: transformer\.h\.0\.mlp\.c_fc\.weight is not finite"):
        training.save(tmp_path, 2, keep_last=1)
    assert_only(tmp_path, first, before)
    assert not list(tmp_path.glob(".step-*"))


def test_every_file_is_on_the_disk_before_the_checkpoint_gets_its_name_and_older_ones_go(
    training, tmp_path, monkeypatch
):
    training.save(tmp_path, 1)
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(("sync", os.readlink(f"/proc/self/fd/{fd}"))), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("rename", str(b))), replace(a, b)))
    saved = training.save(tmp_path, 2, keep_last=1)
    renamed = done.index(("rename", str(saved)))
    hidden = tmp_path / f".step-00000002.{os.getpid()}.tmp"
    files = {str(hidden / path.name) for path in saved.iterdir()}
    assert {path for _, path in done[:renamed]} == {str(hidden), *files}
    named = done.index(("sync", str(tmp_path)))
    assert renamed < named < done.index(("rename", str(tmp_path / ".step-00000001.tmp")))


# ---- kills ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["killed", "moved_folder"])
def test_the_fault_injection_breaks_runs_and_finds_nothing(tmp_path, fault):
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.fault_injection", "--faults", fault, "--times", "1"]
    done = subprocess.run([*command, "--json", str(result)], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(result.read_text())["faults"][fault]
    assert row["times"] >= 1 and row["problems"] == 0


@pytest.mark.slow
def test_every_fault_five_times_breaks_no_promise(tmp_path):
    command = [sys.executable, "-m", "benchmarks.fault_injection", "--times", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=4 * 3600)
    assert done.returncode == 0, done.stdout + done.stderr
