"""`--text FILE`: what it chooses, what it refuses, and a whole run that is interrupted, resumed and ends early."""

import math
import os
import random
import signal
import subprocess
import sys

import pytest

from gpt2repro.command import UsageError
from gpt2repro.data.prepare import prepare
from gpt2repro.data.shards import load_tokenizer, open_dataset
from gpt2repro.recipe import Recipe
from gpt2repro.recipe_parser import OWN_TEXT_RECIPE, parse_recipe
from gpt2repro.run.folder import RunFolder
from gpt2repro.train.estimates import TRAINING_SHARE, within_minutes
from gpt2repro.train.safety import EarlyStop
from tests.conftest import ENVIRONMENT, SCRIPT, end, train_rows, wait_until


def chosen(*words: str) -> Recipe:
    return parse_recipe([*words], default=OWN_TEXT_RECIPE)


@pytest.mark.parametrize(
    ("size", "tokenizer", "max_steps", "layers"),
    # 8 passes over nine tenths of the bytes, 3 to a token and 4,096 tokens to a step; at least 200
    [(10_000, 512, 200, None), (1_000_000, 1024, 585, None), (60_000_000, 8192, 35_156, 6)],
)
def test_the_size_of_a_text_chooses_tokenizer_steps_and_shape(tmp_path, size, tokenizer, max_steps, layers):
    (tmp_path / "my book.txt").write_text("12345678 " * (size // 9 + 1))
    os.truncate(tmp_path / "my book.txt", size)
    recipe = chosen("--text", str(tmp_path / "my book.txt"))
    recipe.check()
    assert (recipe.tokenizer, recipe.max_steps, recipe.n_layer) == (f"train:{tokenizer}", max_steps, layers)
    assert recipe.output_dir.startswith("runs/my-book-") and recipe.dataset_dir[0].startswith("data/my-book-")
    assert (recipe.max_minutes, recipe.sample_prompt, recipe.source) == (8, "12345678 12345678", "text")


def test_two_texts_share_no_folder_and_one_text_has_one(tmp_path):
    for name, text in {"a/t.txt": "one", "b/t.txt": "two", "c/t.txt": "one"}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(f"{text} " * 5000)
    one, two, same = (chosen("--text", str(tmp_path / folder / "t.txt")) for folder in "abc")
    assert one.output_dir != two.output_dir and one.dataset_dir != two.dataset_dir
    assert (one.output_dir, one.dataset_dir) == (same.output_dir, same.dataset_dir)


def test_a_field_on_the_same_line_holds_and_steps_that_are_given_are_not_lowered(tmp_path):
    (tmp_path / "t.txt").write_text("some text " * 1000)
    recipe = chosen("--text", str(tmp_path / "t.txt"), "--max_steps", "7", "--dropout", "0.3", "--output_dir", "here")
    assert (recipe.max_steps, recipe.max_minutes, recipe.dropout, recipe.output_dir) == (7, 0, 0.3, "here")


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "is empty"), (b" \n" * 9000, "is empty"), (b"word\0" * 9000, "is binary"), (b"\xff" * 9000, "not UTF-8"),
     (b"short", r"has 5 bytes, expected 10,000 to"), (None, "cannot be read"), ("folder", "cannot be read")],
)  # fmt: skip
def test_a_text_that_cannot_be_trained_on_is_one_error(tmp_path, content, problem):
    file = tmp_path / "t.txt"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=problem) as raised:
        chosen("--text", str(file))
    assert len(str(raised.value).splitlines()) == 1


def test_a_huge_text_is_refused_without_reading_it(tmp_path):
    with open(tmp_path / "t.txt", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(UsageError, match=r"1,099,511,627,776 bytes.*gpt2repro.data.prepare"):
        chosen("--text", str(tmp_path / "t.txt"))


@pytest.mark.parametrize("also", [["--recipe", "x.yaml"], ["--source", "python-docs"], ["--files", "b.txt"]])
def test_a_text_beside_another_source_of_fields_is_refused(tmp_path, also):
    with pytest.raises(UsageError, match=f"leave {also[0]} out"):
        chosen("--text", str(tmp_path / "t.txt"), *also)


def test_the_last_tenth_of_each_text_validates(tmp_path):
    """And no character is cut in two, no byte is lost."""
    texts = {"a.txt": "é" * 5000 + "\n", "b.log": "First and then last. " * 500}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" * (name == "a.txt") + text.encode())
    folder = prepare(
        source="text", files=[str(tmp_path / name) for name in texts], tokenizer="train:270", out=tmp_path / "out"
    )
    dataset = open_dataset([str(folder)])
    tokenizer = load_tokenizer(str(folder))
    parts = {}
    for split in ("train", "val"):
        stream = dataset.split(split)
        parts[split] = tokenizer.decode(stream.read(0, stream.tokens)).split("<|endoftext|>")[1:]
    assert [train + val for train, val in zip(*parts.values(), strict=True)] == list(texts.values())
    for val, text in zip(parts["val"], texts.values(), strict=True):
        assert len(val.encode()) == pytest.approx(len(text.encode()) / 10, abs=2)


def test_validations_without_a_new_best_end_a_run_and_a_resumed_one_counts_the_same():
    losses = {0: 5.0, 10: 4.0, 20: 4.2, 30: math.nan, 40: 4.0}
    rule = EarlyStop(Recipe(patience=3))
    reasons = []
    for step, loss in losses.items():
        rule.add(step, loss)
        reasons.append(rule.reason())
    assert reasons[:4] == [None] * 4
    assert reasons[4] == "validation loss 4.0000, no new best in 3 validations since 4.0000 at step 10"
    rows = [{"step": s, "kind": "val", "loss": None if math.isnan(loss) else loss} for s, loss in losses.items()]
    assert EarlyStop(Recipe(patience=3), rows).reason() == reasons[4]
    assert EarlyStop(Recipe(patience=4), rows).reason() is None
    assert EarlyStop(Recipe(), rows).reason() is None


def test_minutes_lower_the_steps_and_never_raise_them():
    recipe = Recipe(max_steps=1000, warmup_steps=10, global_batch_tokens=4096, micro_batch_size=4, max_minutes=2)
    shorter, line = within_minutes(recipe, 4096 / TRAINING_SHARE)
    assert (shorter.max_steps, shorter.max_minutes) == (120, 0.0)
    assert "120 of 1,000 steps, for about 2.0 of at most 2 minutes" in line
    assert within_minutes(recipe, 1e9)[0].max_steps == 1000
    assert within_minutes(recipe, 4096 / TRAINING_SHARE, start_step=500)[0].max_steps == 620
    with pytest.raises(ValueError, match=r"max_minutes=2 leaves 5 steps: warmup_steps=10 leaves nothing"):
        within_minutes(recipe, 4096 / 24 / TRAINING_SHARE)


def test_one_command_trains_on_a_text_resumes_after_ctrl_c_and_ends_early_with_the_best_checkpoint(tmp_path):
    draw = random.Random(0)  # words in no order: beyond how often each comes there is nothing to learn
    words = ["a", "of", "the", "what", "night", "summer", "forever"]
    text = " ".join(draw.choices(words, weights=[64, 32, 16, 8, 4, 2, 1], k=5000))
    (tmp_path / "words.txt").write_text(text)
    small = "--tokenizer train:270 --n_layer 1 --n_head 2 --n_embd 64 --n_positions 32 --seq_len 32"
    small += " --global_batch_tokens 512 --micro_batch_size 16 --eval_every 20 --save_every 20 --patience 2"
    small += " --eval_tokens 300 --sample_every 0 --mixed_precision no --max_minutes 60 --keep_last 1"
    command = [sys.executable, str(SCRIPT), "--text", "words.txt", *small.split()]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONUNBUFFERED": "1"}

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    process = start()
    wait_until(lambda: list(tmp_path.glob("runs/*/step-*")), process)
    process.send_signal(signal.SIGINT)
    first = end(process)
    assert process.returncode == 75, first
    assert "tokenizer train:270, 1 layers, at most 200 steps of 512 tokens" in first
    assert "of at most 60 minutes" in first

    process = start()
    second = end(process)
    assert process.returncode == 0, second
    (run,) = (tmp_path / "runs").iterdir()
    validations = {step: row["loss"] for step, row in train_rows(run, "val").items()}
    best, *after = (step for step in validations if step >= min(validations, key=validations.__getitem__))
    assert "has 200, and keeps them" in second and "resumed from" in second
    assert len(after) == 2 and max(validations) < 200  # of 200 steps
    assert f"ended early: validation loss {validations[after[1]]:.4f}, no new best in 2 validations since" in second
    assert f"{run.name}/best" in second
    assert {path.name for path in run.glob("step-*")} == {f"step-{best:08d}", f"step-{after[1]:08d}"}
    assert RunFolder(run).best.resolve().name == f"step-{best:08d}"
