"""The folder of a run: one process writes in it, it may be moved, and another run's folder stays unchanged."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from gpt2repro.recipe import Recipe
from gpt2repro.run.checkpoints import verify_checkpoint
from gpt2repro.run.folder import RunFolder
from tests.conftest import ROOT, end, wait_until
from tests.run.test_checkpoints import Training
from tests.test_train import assert_same_bits

FACTS = {"dataset": {"fingerprint": "f"}, "model": {}}


@pytest.fixture(scope="module")
def training(tiny_dataset) -> Training:
    return Training(tiny_dataset)


def claimed(path, recipe=None) -> RunFolder:
    folder = RunFolder(path)
    folder.claim(recipe or Recipe(), **FACTS, world_size=1)
    return folder


def content(folder) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_claimed_folder_that_is_moved_stays_the_runs_and_another_in_its_place_is_not_touched(tmp_path):
    folder = claimed(tmp_path / "run")
    log = folder.open_metrics(Recipe(), step=0)
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    log.write(1, "train", loss=1.0)
    assert folder.path == tmp_path / "moved"
    assert [row["step"] for row in folder.rows()] == [1]
    assert folder.record()["starts"]
    with pytest.raises(ValueError, match="another process trains in"):
        claimed(tmp_path / "moved")
    folder.release()
    assert content(tmp_path / "run") == {"thesis.tex": b"mine"}
    assert sorted(content(tmp_path / "moved")) == ["metrics.jsonl", "recipe.yaml", "run.json"]


def test_a_run_whose_folder_is_moved_while_it_trains_ends_in_it_with_the_same_bits(
    train_script, unbroken_run, tmp_path
):
    process = train_script.start_paused(tmp_path / "run", "step 5")
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").mkdir()
    train_script.proceed(tmp_path / "run")
    output = end(process)
    assert process.returncode == 0, output
    assert f"done: step 8, {tmp_path / 'moved' / 'latest'}" in output
    assert not list((tmp_path / "run").iterdir())
    assert sorted(content(tmp_path / "moved")) == sorted(content(unbroken_run))
    assert_same_bits(tmp_path / "moved", unbroken_run)


def test_a_folder_that_is_deleted_while_a_run_trains_is_one_error(train_script, tmp_path):
    process = train_script.start_paused(tmp_path / "run", "step 2")
    (tmp_path / "run").rename(tmp_path / "deleted")
    subprocess.run(["rm", "-r", tmp_path / "deleted"], check=True)
    train_script.proceed(tmp_path / "run")
    output = end(process)
    assert process.returncode == 1, output
    (error,) = [line for line in output.splitlines() if line.startswith("error")]
    assert "saving step 3" in error and "No such file or directory" in error
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    code = (
        "import sys, time\nfrom gpt2repro.recipe import Recipe\nfrom gpt2repro.run.folder import RunFolder\n"
        f"folder = RunFolder(sys.argv[1])\nfolder.claim(Recipe(), **{FACTS!r}, world_size=1)\n"
        "open(sys.argv[2], 'w')\ntime.sleep(600)\n"
    )
    first = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run", tmp_path / "claimed"], cwd=ROOT)
    wait_until((tmp_path / "claimed").exists, first)
    before = content(tmp_path / "run")
    with pytest.raises(ValueError, match=f"another process trains in {tmp_path / 'run'}: end it"):
        claimed(tmp_path / "run")
    assert content(tmp_path / "run") == before
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = claimed(tmp_path / "run")
    assert len({start["pid"] for start in second.record()["starts"]}) == 2
    assert len(second.record()["starts"]) == 2
    second.release()


def test_a_disk_without_locks_is_a_warning_and_the_first_of_two_writers_ends_at_its_next_save(
    training, tmp_path, monkeypatch, capsys
):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first = claimed(tmp_path / "run")
    warning = f"warning: the disk of {tmp_path / 'run'} has no file locks (No locks available)"
    assert capsys.readouterr().err.startswith(warning)
    monkeypatch.setattr(os, "getpid", lambda: 12345)
    claimed(tmp_path / "run").save(2, Recipe(), fingerprint="f", **training.parts())
    monkeypatch.undo()
    before = content(tmp_path / "run")
    with pytest.raises(ValueError, match=f"another process has started in {tmp_path / 'run'} since .*process 12345"):
        first.save(4, Recipe(), fingerprint="f", **training.parts())
    assert content(tmp_path / "run") == before


def test_a_folder_that_is_moved_in_the_middle_of_a_save_gets_the_checkpoint(training, tmp_path, monkeypatch):
    folder, write_weights = claimed(tmp_path / "run"), training.model.save_pretrained

    def move_first(*arguments, **settings):
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").mkdir()
        write_weights(*arguments, **settings)

    monkeypatch.setattr(training.model, "save_pretrained", move_first)
    folder.save(2, Recipe(), fingerprint="f", **training.parts())
    folder.release()
    assert not list((tmp_path / "run").iterdir())
    assert verify_checkpoint(tmp_path / "moved" / "latest")["step"] == 2


def test_a_folder_of_another_run_or_of_something_else_is_refused_and_left_as_it_was(tmp_path):
    recipe = Recipe()
    claimed(tmp_path / "run", recipe).release()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("mine")
    before = content(tmp_path)
    other_data = {"dataset": {"fingerprint": "other"}, "model": {}}
    for path, changed, facts, expected in (
        ("run", replace(recipe, seed=7), FACTS, "holds another run .seed is 1337 there and 7 here.: give another"),
        ("run", replace(recipe, max_steps=9), FACTS, r"another --output_dir \(and --resume .*/run/latest to train"),
        ("run", recipe, other_data, "the dataset is another one"),
        ("run", replace(recipe, resume="never"), FACTS, "holds a run and resume is never"),
        ("thesis", recipe, FACTS, "is not empty and holds no run"),
    ):
        with pytest.raises(ValueError, match=expected):
            RunFolder(tmp_path / path).check(changed, **facts)
        assert content(tmp_path) == before


def test_the_record_holds_every_start_and_what_may_change_may_change(tmp_path):
    for recipe in (Recipe(), Recipe(micro_batch_size=8, save_every=5)):
        claimed(tmp_path / "run", recipe).release()
    record = RunFolder(tmp_path / "run").record()
    assert [start["processes"] for start in record["starts"]] == [1, 1]
    assert record["recipe"]["micro_batch_size"] == 8
    assert {"time", "command", "git_commit", "hardware", "versions"} <= record["starts"][0].keys()


def test_a_folder_that_a_kill_left_at_the_very_start_can_be_claimed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".run.json.tmp").write_text('{"rec')
    claimed(tmp_path / "run").release()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["model"] == "gpt2"


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir .*file/run cannot be written .*: give another --output_dir"):
        claimed(tmp_path / "file" / "run")


def test_a_relative_folder_stays_the_same_after_a_change_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = claimed("run")
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    assert folder.path == tmp_path / "run"
    folder.release()
