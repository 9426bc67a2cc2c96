"""Damage from outside: to every file of a dataset, to a run's own files; a disk that is full while a run trains."""

import contextlib
import json
import resource
import shutil

import pytest

import train_accelerate
from eval.sample import main as sample
from eval.validation import main as validate
from gpt2repro.data.shards import open_dataset, tokenizer_sha256
from gpt2repro.hub.convert import main as convert
from gpt2repro.hub.gguf import main as gguf
from gpt2repro.hub.publish import main as publish
from gpt2repro.run.checkpoints import RECORD
from gpt2repro.tools.inspect import main as inspect
from tests.conftest import end, train_rows
from tests.run.test_checkpoints import DAMAGE, content, file_size_limit, flip
from tests.test_train import assert_same_bits


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_of_a_dataset_is_named_by_opening_or_verifying_it(tiny_dataset, tmp_path, capsys, damage):
    names = sorted(path.name for path in tiny_dataset.iterdir())
    assert {"dataset.json", "tokenizer.json", "train-00000.npy", "val-00000.npy"} <= set(names)
    for name in set(names) - {"tokenizer_config.json"}:  # which decides no token id
        copy = shutil.copytree(tiny_dataset, tmp_path / name / "copy")
        DAMAGE[damage](copy / name)
        damaged = content(copy)
        code = 1
        with contextlib.suppress(SystemExit):
            code = inspect([str(copy), "--verify"])
        printed = "".join(capsys.readouterr())
        assert code != 0
        assert name in printed or (name == "tokenizer.json" and f"{copy}" in printed), printed
        assert content(copy) == damaged


def test_a_bit_flipped_anywhere_in_a_datasets_record_is_an_error(tiny_dataset, tmp_path):
    copy = shutil.copytree(tiny_dataset, tmp_path / "copy")
    fingerprint = open_dataset(copy).fingerprint
    record = copy / "dataset.json"
    for position in range(record.stat().st_size):
        flip(record, position)
        with pytest.raises(ValueError, match=r"dataset\.json"):
            open_dataset(copy)
        flip(record, position)
    assert open_dataset(copy).fingerprint == fingerprint


def test_a_bit_flipped_anywhere_in_a_datasets_tokenizer_is_one_error_or_does_no_harm(tiny_dataset, tmp_path):
    copy = shutil.copytree(tiny_dataset, tmp_path / "copy")
    file = copy / "tokenizer.json"
    positions = range(3, file.stat().st_size, 211)
    for position in positions:
        flip(file, position)
        with contextlib.suppress(ValueError):
            tokenizer_sha256(copy)
        flip(file, position)
    assert len(positions) > 50
    assert tokenizer_sha256(copy) == open_dataset(copy).tokenizer_sha256


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", RECORD])
def test_a_flipped_bit_in_a_checkpoint_is_named_by_every_command_that_reads_one(
    unbroken_run, train_script, tmp_path, capsys, name
):
    checkpoint = shutil.copytree(unbroken_run / "step-00000008", tmp_path / "checkpoint")
    (tmp_path / "text").write_text("a text")
    flip(checkpoint / name, 400)
    read = {
        validate: ["--model", checkpoint, "--text", tmp_path / "text"],
        sample: ["--model", checkpoint, "--prompt", "a"],
        convert: [checkpoint, tmp_path / "out", "--to", "gpt2"],
        gguf: [checkpoint, tmp_path / "out"],
        publish: [checkpoint, "--repo-id", "me/model", "--dry-run", tmp_path / "out"],
        train_accelerate.main: train_script.flags(tmp_path / "run", init_from=checkpoint),
    }
    for main, arguments in read.items():
        assert main([str(word) for word in arguments]) == 1
        error = capsys.readouterr().err
        assert f"{name} " in error or f"no tokenizer loads from '{checkpoint}'" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "text"]


def test_a_flag_turns_the_comparison_with_the_record_off(unbroken_run, tmp_path):
    checkpoint = shutil.copytree(unbroken_run / "step-00000008", tmp_path / "checkpoint")
    (tmp_path / "text").write_text("a text")
    flip(checkpoint / "model.safetensors", -4)  # the last bit of a number
    read = {
        validate: ["--model", checkpoint, "--text", tmp_path / "text"],
        sample: ["--model", checkpoint, "--prompt", "a", "--max-new-tokens", "1"],
        convert: [checkpoint, tmp_path / "out", "--to", "gpt2"],
        gguf: [checkpoint, tmp_path / "out.gguf"],
    }
    for main, arguments in read.items():
        assert main([str(word) for word in arguments]) == 1
        assert main([*(str(word) for word in arguments), "--no-verify"]) == 0


def test_the_weights_of_a_checkpoint_load_without_its_optimizer_state(unbroken_run, tmp_path, capsys):
    checkpoint = shutil.copytree(unbroken_run / "step-00000008", tmp_path / "checkpoint")
    (checkpoint / "optimizer.safetensors").unlink()
    assert sample(["--model", str(checkpoint), "--prompt", "a", "--max-new-tokens", "1"]) == 0


def test_training_refuses_a_tokenizer_that_did_not_make_the_tokens(train_script, tiny_dataset, tmp_path, capsys):
    copy = shutil.copytree(tiny_dataset, tmp_path / "dataset")
    tokenizer = json.loads((copy / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    assert train_accelerate.main(train_script.flags(tmp_path / "run", dataset_dir=copy)) == 1
    assert f"error: the tokenizer in {copy} is not the one that made its tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def interrupted_run(unbroken_run, tmp_path):
    """A run as it is at step 6 of 8."""
    run_dir = shutil.copytree(unbroken_run, tmp_path / "run", symlinks=True)
    shutil.rmtree(run_dir / "step-00000008")
    return run_dir


@pytest.mark.parametrize("text", ["", "{", "[]", '{"recipe": {}}', "\x00" * 64])
def test_a_damaged_run_record_is_named_and_left(interrupted_run, train_script, capsys, text):
    (interrupted_run / "run.json").write_text(text)
    before = content(interrupted_run)
    assert train_accelerate.main(train_script.flags(interrupted_run)) == 1
    assert f"error: {interrupted_run / 'run.json'} cannot be read" in capsys.readouterr().err
    assert content(interrupted_run) == before


def test_a_run_resumes_with_a_dangling_link_a_broken_recipe_and_broken_lines_of_metrics(
    interrupted_run, train_script, unbroken_run
):
    assert not (interrupted_run / "latest").exists()  # it points at step 8, which is gone
    (interrupted_run / "recipe.yaml").write_bytes(b"\xff\x00: [")
    rows = (interrupted_run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    broken = [b"\x00" * 512 + b"\n", b"\xff\xfe\n", b"3\n", b'{"step": 2}\n', b'{"step": 4, "kind": "tr\n']
    (interrupted_run / "metrics.jsonl").write_bytes(b"".join([*rows[:2], *broken, *rows[2:]]) + b'{"st')
    assert "resumed from" in train_script(interrupted_run)
    assert_same_bits(interrupted_run, unbroken_run)
    assert content(interrupted_run)["recipe.yaml"].startswith(b"output_dir: ")


def test_a_full_disk_in_a_save_is_one_error_on_each_of_two_processes_and_the_run_resumes_bit_exactly(
    interrupted_run, train_script, unbroken_run
):
    limit = (interrupted_run / "step-00000006" / "optimizer.safetensors").stat().st_size - 1
    before = content(interrupted_run / "step-00000006")
    with file_size_limit(limit):
        process = train_script.start(interrupted_run, processes=2)
    output = end(process)
    assert process.returncode == 1
    assert output.count(f"error: saving step 8 in {interrupted_run} failed") == 1, output
    assert output.count("error on process 1: ") <= 1  # the same, if the launcher let it live so long
    assert "File too large" in output and "[rank" not in output  # no traceback from the script
    assert not (interrupted_run / "step-00000008").exists()
    assert content(interrupted_run / "step-00000006") == before
    train_script(interrupted_run)
    assert_same_bits(interrupted_run, unbroken_run)


def test_a_metrics_file_that_cannot_grow_is_one_error_and_no_row_is_lost_or_doubled(train_script, tmp_path):
    fields = {"max_steps": 60, "save_every": 20, "eval_every": 0, "n_embd": 8}
    process = train_script.start_paused(tmp_path / "run", "step 25", **fields)
    grown = (tmp_path / "run" / "metrics.jsonl").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (grown + 100, resource.RLIM_INFINITY))
    train_script.proceed(tmp_path / "run")
    output = end(process)
    assert process.returncode == 1, output
    (error,) = [line for line in output.splitlines() if line.startswith("error")]
    assert "metrics.jsonl cannot be written (File too large); the checkpoints are untouched: make room" in error
    assert "Traceback" not in output and "Exception ignored" not in output
    assert f"resumed from {tmp_path / 'run' / 'step-00000020'}" in train_script(tmp_path / "run", **fields)
    assert list(train_rows(tmp_path / "run")) == list(range(1, 61))
