"""Mirrors: a run whose disk is lost resumes from the Hub (a stub), a folder or S3 (moto), and what can go wrong."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from gpt2repro.hub.mirror import MirrorPush, restore
from gpt2repro.hub.store import Store
from gpt2repro.recipe import Recipe
from gpt2repro.recipe_parser import parse_recipe
from gpt2repro.run.folder import RunFolder
from tests.conftest import end, kill, wait_until
from tests.hub.test_publish import pushed
from tests.test_train import assert_same_bits


@pytest.fixture(scope="module")
def s3():
    """The environment of an S3 on loopback that has the bucket `bucket`."""
    moto = pytest.importorskip("moto.server", reason="no S3 without moto")
    pytest.importorskip("s3fs", reason="no S3 without s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "5ecret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        import boto3

        boto3.client("s3").create_bucket(Bucket="bucket")
    yield environment
    server.stop()


@pytest.fixture
def fields(request, tmp_path):
    """The recipe's fields for a mirror in the store that the test asks for."""
    if request.param == "the Hub":
        request.getfixturevalue("hub")
        return {"hub_repo_id": "me/model", "hub_state": "true"}
    if request.param == "S3":
        patch = request.getfixturevalue("monkeypatch")
        for name, value in request.getfixturevalue("s3").items():
            patch.setenv(name, value)
        return {"mirror": f"s3://bucket/{tmp_path.name}/run"}
    return {"mirror": f"file://{tmp_path}/mirror"}


every_store = pytest.mark.parametrize("fields", ["the Hub", "a folder", "S3"], indirect=True)
in_a_folder = pytest.mark.parametrize("fields", ["a folder"], indirect=True)


def store_of(fields) -> Store:
    return Store(fields.get("mirror", "hf://me/model@state"))


class Mirrored:
    """A copy of the unbroken run in `folder`, and what its process does with its mirror."""

    def __init__(self, train_script, folder: Path, fields) -> None:
        self.recipe = parse_recipe(train_script.flags(folder, **fields), default="")
        self.folder = RunFolder(folder)
        record = self.folder.record()
        self.facts = {"dataset": record["dataset"], "model": record["model"]}

    def claim(self) -> MirrorPush:
        self.folder.claim(self.recipe, **self.facts, world_size=1)
        return MirrorPush(self.recipe, self.folder)

    def restore(self, folder: Path, **changes) -> None:
        recipe = Recipe(**{**vars(self.recipe), **changes, "output_dir": str(folder)})
        restore(RunFolder(folder), recipe, dataset=self.facts["dataset"])


@pytest.fixture
def mirrored(unbroken_run, train_script, tmp_path, fields):
    run = shutil.copytree(unbroken_run, tmp_path / "run", symlinks=True)
    mirrored = Mirrored(train_script, run, fields)
    yield mirrored
    mirrored.folder.release()


def push_both(mirrored) -> None:
    push = mirrored.claim()
    for name in ("step-00000006", "step-00000008"):
        push.submit(mirrored.folder.path / name)
        assert "url" in pushed(push, 1)[0]


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def flip_a_bit(file: Path):
    """Flip a bit in the middle of a file; returns what puts it back."""
    before = file.read_bytes()
    changed = bytearray(before)
    changed[len(before) // 2] ^= 1
    file.write_bytes(changed)
    return lambda: file.write_bytes(before)


@every_store
def test_a_store_keeps_the_newest_states_and_gives_them_back(mirrored, fields, tmp_path):
    run = mirrored.folder.path
    push = mirrored.claim()
    for name in ("step-00000006", "step-00000008"):
        push.submit(run / name)
        (row,) = pushed(push, 1)
        assert row.get("url") == f"{store_of(fields).url}/{name}", row
    assert store_of(fields).steps() == [6, 8]
    shutil.copytree(run / "step-00000008", run / "step-00000009")
    push.submit(run / "step-00000009")
    assert "url" in pushed(push, 1)[0]
    assert store_of(fields).steps() == [8, 9]  # keep_last is 2
    mirrored.restore(tmp_path / "other")
    assert content(tmp_path / "other" / "step-00000009") == content(run / "step-00000009")
    for name in ("run.json", "recipe.yaml", "metrics.jsonl"):
        assert (tmp_path / "other" / name).read_bytes() == (run / name).read_bytes()


@every_store
def test_a_killed_run_whose_disk_is_wiped_resumes_from_its_mirror_bit_exactly(
    train_script, unbroken_run, fields, tmp_path
):
    run, secret = tmp_path / "run", os.environ.get("HF_TOKEN", "5ecret")
    process = train_script.start_paused(run, "step 5", **fields)
    wait_until(lambda: store_of(fields).steps() == [3], process)
    kill(process)
    output = end(process)
    shutil.rmtree(run)
    output += train_script(run, **fields)
    assert f"{run}: step 3 is copied from {store_of(fields).url}; it had no checkpoint" in output
    assert f"resumed from {run / 'step-00000003'}" in output
    assert_same_bits(run, unbroken_run)
    assert store_of(fields).steps()[-1] == 8
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert len(starts) == 2
    assert secret not in output
    assert not any(secret.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


@in_a_folder
def test_a_stopped_run_ends_after_its_copy_and_a_damaged_copy_is_passed_over(
    train_script, unbroken_run, fields, tmp_path
):
    run = tmp_path / "run"
    process = train_script.start_paused(run, "step 5", **fields)
    process.send_signal(signal.SIGTERM)
    output = end(process)
    assert process.returncode == 75 and "mirror of step 5 to" in output
    assert store_of(fields).steps() == [3, 5]
    flip_a_bit(tmp_path / "mirror" / "step-00000005" / "optimizer.safetensors")
    shutil.rmtree(run)
    output = train_script(run, **fields)
    damaged = "optimizer.safetensors is damaged (its sha256 is not the recorded one)"
    assert f"warning: step 5 in {store_of(fields).url} is damaged, the state before it is tried: " in output
    assert damaged in output and f"{run}: step 3 is copied from" in output
    assert_same_bits(run, unbroken_run)
    steps = store_of(fields).steps()
    assert steps[-1] == 8 and 5 not in steps


@in_a_folder
def test_only_a_state_that_is_newer_than_the_local_run_is_copied(mirrored, fields, tmp_path, capsys):
    push_both(mirrored)
    run = shutil.copytree(mirrored.folder.path, tmp_path / "local", symlinks=True)
    mirrored.restore(run)
    assert capsys.readouterr().out == ""
    shutil.rmtree(run / "step-00000008")
    mirrored.restore(run)
    url = store_of(fields).url
    assert capsys.readouterr().out == f"{run}: step 8 is copied from {url}; its newest checkpoint was step 6\n"
    assert content(run / "step-00000008") == content(mirrored.folder.path / "step-00000008")


@in_a_folder
def test_the_best_checkpoint_is_kept_and_comes_back_with_the_newest(mirrored, fields, tmp_path):
    run = mirrored.folder.path
    (run / "best").symlink_to("step-00000006")
    push = mirrored.claim()
    for step in (6, 8, 9, 10):
        if step > 8:
            shutil.copytree(run / "step-00000008", run / f"step-{step:08d}")
        push.submit(run / f"step-{step:08d}")
        assert "url" in pushed(push, 1)[0]
    assert store_of(fields).steps() == [6, 9, 10]
    mirrored.restore(tmp_path / "other")
    assert sorted(path.name for path in (tmp_path / "other").glob("step-*")) == ["step-00000006", "step-00000010"]
    assert (tmp_path / "other" / "best").resolve() == tmp_path / "other" / "step-00000006"


@in_a_folder
def test_a_mirror_with_another_run_is_refused_before_anything_is_written(mirrored, tmp_path):
    push_both(mirrored)
    new = tmp_path / "new"
    for changes, expected in (
        ({"seed": 7}, "holds another run (seed is 1337 there and 7 here): give another mirror, or the same values"),
        ({"resume": "never"}, "holds another run (resume is never, which begins a new one)"),
    ):
        with pytest.raises(ValueError) as refused:
            mirrored.restore(new, **changes)
        assert expected in str(refused.value)
    assert not new.exists()
    other = shutil.copytree(mirrored.folder.path, tmp_path / "other", symlinks=True)
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**record, "id": "another"}))
    before = content(other)
    with pytest.raises(ValueError, match=r"holds another run .*and .*/other holds another"):
        mirrored.restore(other)
    assert content(other) == before


@in_a_folder
def test_a_flipped_bit_in_any_file_of_a_state_is_noticed(mirrored, tmp_path, capsys):
    push_both(mirrored)
    mirror = tmp_path / "mirror"
    for number, file in enumerate([mirror / "step-00000008.json", *sorted((mirror / "step-00000008").iterdir())]):
        restored = tmp_path / f"restored-{number}"
        put_back = flip_a_bit(file)
        mirrored.restore(restored)
        put_back()
        assert "warning: step 8 in " in capsys.readouterr().out, file
        assert [path.name for path in restored.glob("*step-*")] == ["step-00000006"], file
    for step in (6, 8):
        (mirror / f"step-{step:08d}" / "config.json").unlink()
    with pytest.raises(ValueError, match="holds only damaged states: give another mirror"):
        mirrored.restore(tmp_path / "none")


@every_store
def test_a_start_that_is_no_longer_the_newest_copies_nothing(mirrored, fields):
    run = mirrored.folder.path
    push = mirrored.claim()
    store_of(fields).claim(b'{"host": "another"}')
    push.submit(run / "step-00000008")
    (row,) = pushed(push, 1)
    assert 'has another writer by now ({"host": "another"}): this start copies nothing there' in row["error"]
    assert store_of(fields).steps() == []


@in_a_folder
def test_a_copy_that_was_cut_off_is_no_state_and_is_deleted_by_the_next_one(mirrored, fields, tmp_path):
    push = mirrored.claim()
    half = tmp_path / "mirror" / "step-00000003"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (tmp_path / "mirror" / "notes.txt").write_text("of somebody")
    mirrored.restore(tmp_path / "other")
    assert store_of(fields).steps() == [] and not (tmp_path / "other").exists()
    push.submit(mirrored.folder.path / "step-00000008")
    assert "url" in pushed(push, 1)[0]
    assert sorted(path.name for path in (tmp_path / "mirror").iterdir()) == [
        "notes.txt", "step-00000008", "step-00000008.json", "writer.json",
    ]  # fmt: skip


@in_a_folder
def test_a_download_that_was_cut_off_begins_again(mirrored, tmp_path):
    push_both(mirrored)
    other = tmp_path / "other"
    (other / ".step-00000008.mirror.tmp").mkdir(parents=True)
    (other / ".step-00000008.mirror.tmp" / "model.safetensors").write_bytes(b"half")
    RunFolder(other).check(mirrored.recipe, **mirrored.facts)
    mirrored.restore(other)
    assert content(other / "step-00000008") == content(mirrored.folder.path / "step-00000008")
    assert not list(other.glob(".step-*"))


@in_a_folder
def test_a_mirror_on_a_full_disk_keeps_the_state_before(mirrored, fields, tmp_path):
    run, disk = mirrored.folder.path, tmp_path / "mirror"
    disk.mkdir()
    size = sum(file.stat().st_size for file in (run / "step-00000008").iterdir())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    try:
        push = mirrored.claim()
        rows = []
        for name in ("step-00000006", "step-00000008"):
            push.submit(run / name)
            rows += pushed(push, 1)
        assert "url" in rows[0] and "No space left on device" in rows[1]["error"]
        mirrored.restore(tmp_path / "other")
        assert (tmp_path / "other" / "step-00000006").is_dir()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("fields", ["the Hub", "S3"], indirect=True)
def test_a_store_that_does_not_answer_is_one_error_within_seconds(mirrored, fields, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot be (opened|read)"):
        mirrored.restore(tmp_path / "other")
    assert time.monotonic() - began < 60  # and not the minutes of a library's retries
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"hub_state": True}, "hub_state is true and hub_repo_id is None: give OWNER/NAME"),
        ({"hub_state": True, "hub_repo_id": "me/x", "mirror": "s3://b/x"}, "give one of them"),
        ({"mirror": "bucket/run"}, "mirror is 'bucket/run': give a URL"),
        ({"mirror": "memory://run"}, "mirror is 'memory://run': give a URL"),
        ({"mirror": "ftp://me:secret@host/run"}, "mirror has a password or a query in it"),
        ({"mirror": "hf://me/model"}, "give a branch beside main"),
        ({"mirror": "hf://me/model@main"}, "give a branch beside main"),
        ({"mirror": "file:///runs/x", "output_dir": "/runs/x/"}, "is output_dir: give another folder"),
    ],
)
def test_a_mirror_that_cannot_be_is_refused(fields, expected):
    with pytest.raises(ValueError) as refused:
        Recipe(**fields).check()
    (line,) = str(refused.value).splitlines()
    assert expected in line and "secret" not in line


@pytest.mark.parametrize(
    ("url", "reason"),
    [("nonsense://x", "Protocol not known: nonsense"), ("file:///nowhere/at/all", "No such file or directory")],
)
def test_a_store_that_is_not_there_is_named(url, reason):
    with pytest.raises(ValueError, match=f"{url} cannot be (opened|written) .*{reason}"):
        Store(url).claim(b"{}")
