"""What people get wrong: one clear line for each mistake, all of a configuration's together, nothing written over."""

import importlib
import json
import shutil

import numpy as np
import pytest

import train_accelerate
from gpt2repro import command
from gpt2repro.hub import convert
from tests.conftest import TINY


@pytest.fixture
def refused(tmp_path, tiny_dataset, capsys):
    """Run the script in this process with fields changed; returns its error lines after checking the exit code."""

    def run(*, exit_code: int = 1, extra: tuple[str, ...] = (), **fields) -> list[str]:
        recipe = {**TINY, "dataset_dir": tiny_dataset, "output_dir": tmp_path / "run", **fields}
        flags = [word for name, value in recipe.items() for word in (f"--{name}", str(value))]
        assert train_accelerate.main([*flags, *extra]) == exit_code
        lines = capsys.readouterr().err.splitlines()
        assert lines
        assert all(line.startswith("error: ") for line in lines if not line.startswith("["))
        return lines

    yield run
    assert not (tmp_path / "run").exists()


@pytest.fixture
def dataset_copy(tiny_dataset, tmp_path):
    return shutil.copytree(tiny_dataset, tmp_path / "dataset")


def test_an_unknown_flag_is_named_with_its_nearest_neighbour(refused):
    (line,) = refused(exit_code=2, extra=("--learning_rat", "1e-3"))
    assert line == "error: unknown flag: --learning_rat; did you mean learning_rate?"


def test_an_unknown_recipe_key_and_wrong_types_are_named_together(tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("max_step: 10\nlearning_rate: fast\nshuffle: maybe\nseq_len: 10.5\nwarmup_steps: [1]\n")
    assert train_accelerate.main(["--recipe", str(recipe), "--output_dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: unknown recipe key in {recipe}: max_step; did you mean max_steps?",
        "error: learning_rate is 'fast': expected a number",
        "error: shuffle is 'maybe': expected true or false",
        "error: seq_len is '10.5': expected a whole number",
        "error: warmup_steps is ['1']: expected a whole number",
    ]


def test_a_recipe_that_is_missing_or_no_yaml_is_refused(tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    for name, expected in (
        ("nowhere.yaml", "recipes beside it:"),
        ("broken.yaml", "cannot be read"),
        ("list.yaml", "expected lines of the form"),
    ):
        assert train_accelerate.main(["--recipe", str(tmp_path / name)]) == 2
        assert expected in capsys.readouterr().err


def test_all_problems_of_a_recipe_are_named_at_once_and_then_those_of_the_models_shape(refused):
    shape = {"n_head": 5, "n_layer": 0}
    lines = refused(
        schedule="linear", beta2=1.0, micro_batch_size=3, warmup_steps=8, grad_clip=-1, eval_tasks="piqa",
        eval_every=0, files="a.txt", vocab_size=0, **shape,
    )  # fmt: skip
    assert [line.split(":")[1].split()[0] for line in lines] == [
        "vocab_size", "schedule", "grad_clip", "beta2", "warmup_steps=8", "source", "eval_tasks",
        "global_batch_tokens=256",
    ]  # fmt: skip
    assert [line.split(":")[1].split()[0] for line in refused(**shape)] == ["n_layer", "n_embd=32"]
    (line,) = refused(model="gpt3")
    assert "give one of gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo" in line


def test_a_global_batch_that_does_not_divide_names_the_micro_batch_sizes_that_do(refused):
    (line,) = refused(micro_batch_size=3)
    assert "global_batch_tokens=256 is not a multiple of 3 * 32 * 1 = 96" in line
    assert line.endswith("give a micro_batch_size of 1, 2, 4, 8")


def test_a_global_batch_that_no_micro_batch_divides_names_the_nearest(refused):
    (line,) = refused(global_batch_tokens=250)
    assert line.endswith("no micro batch size divides it; the nearest that works is 256")


def test_a_sequence_longer_than_n_positions_is_refused(refused):
    (line,) = refused(seq_len=64)
    assert "seq_len=64 is longer than the model's n_positions=32" in line


def test_heads_that_do_not_divide_the_channels_are_refused(refused):
    (line,) = refused(n_head=3)
    assert "n_embd=32 is not a multiple of n_head=3" in line


def test_a_missing_dataset_is_refused(refused, tmp_path):
    (line,) = refused(dataset_dir=tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in line


@pytest.mark.parametrize("content", [None, "{", '{"format_version": 1}', "[]"])
def test_a_dataset_without_or_with_a_broken_record_is_refused(refused, dataset_copy, content):
    record = dataset_copy / "dataset.json"
    record.unlink() if content is None else record.write_text(content)
    assert any("dataset" in line for line in refused(dataset_dir=dataset_copy))


def test_a_missing_shard_is_named(refused, dataset_copy):
    (dataset_copy / "train-00000.npy").unlink()
    assert any("train-00000.npy" in line for line in refused(dataset_dir=dataset_copy))


def test_a_tokenizer_that_is_not_the_datasets_is_refused(refused, tmp_path, tiny_dataset):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tiny_dataset)
    other.add_tokens(["<|other|>"])
    other.save_pretrained(tmp_path / "other")
    for tokenizer in (tmp_path / "other", "train:600", "openai-community/gpt2"):
        (line,) = refused(tokenizer=tokenizer)
        assert f"tokenizer is {tokenizer}, but {tiny_dataset} has another one (train:512)" in line


def test_a_dataset_that_was_made_from_other_text_is_refused(refused, tmp_path, capsys):
    from gpt2repro.data.prepare import prepare

    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"The text of {name}. " * 400)
    made = prepare(source="files", files=[str(tmp_path / "a.txt")], tokenizer="train:262", out=tmp_path / "data")
    capsys.readouterr()
    (line,) = refused(source="files", files=tmp_path / "b.txt", tokenizer="train:262", dataset_dir=made)
    assert f"source is files {tmp_path / 'b.txt'}, but {made} was made from" in line
    (line,) = refused(source="python-docs", tokenizer="train:262", dataset_dir=made)
    assert "source is python-docs, but" in line


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(refused):
    (line,) = refused(vocab_size=300)
    assert "vocab_size=300 is smaller than the 512 entries of the dataset's tokenizer" in line


def test_token_ids_past_the_vocabulary_are_refused_with_their_place(refused, tiny_dataset, tmp_path):
    (tmp_path / "foreign").mkdir()
    np.full(5000, 60_000, np.uint16).tofile(tmp_path / "foreign" / "train.bin")
    fields = {"dataset_format": "nanogpt", "tokenizer": tiny_dataset, "eval_every": 0}
    (line,) = refused(dataset_dir=tmp_path / "foreign", **fields)
    assert "token id 60,000 at position" in line
    assert "train.bin" in line
    assert "vocab_size 512" in line


def test_an_unwritable_output_folder_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    (line,) = refused(output_dir=tmp_path / "file" / "run")
    assert f"output_dir {tmp_path / 'file' / 'run'} cannot be written" in line
    assert line.endswith("give another --output_dir")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_folder_that_holds_something_else_is_left_alone(refused, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("mine")
    (line,) = refused(output_dir=tmp_path / "thesis")
    assert "is not empty and holds no run" in line
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


def test_a_folder_that_holds_another_run_is_left_alone(refused, unbroken_run, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in unbroken_run.rglob("*")}
    (line,) = refused(output_dir=unbroken_run, learning_rate=1e-3, seed=7)
    assert "learning_rate is 0.003 there and 0.001 here; seed is 1337 there and 7 here" in line
    (line,) = refused(output_dir=unbroken_run, resume="never")
    assert "holds a run and resume is never" in line
    assert {path: path.stat().st_mtime_ns for path in unbroken_run.rglob("*")} == before


def test_a_damaged_checkpoint_is_named_and_previous_is_used_only_when_asked(
    refused, unbroken_run, train_script, tmp_path
):
    run_dir = shutil.copytree(unbroken_run, tmp_path / "damaged", symlinks=True)
    model = run_dir / "step-00000008" / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    (line,) = refused(output_dir=run_dir)
    assert "step-00000008/model.safetensors is damaged" in line
    assert "--resume previous" in line
    assert model.read_bytes() == content
    assert "step-00000006" in train_script(run_dir, resume="previous")
    assert model.read_bytes() == (unbroken_run / "step-00000008" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("resume", ["previous", "nowhere"])
def test_a_checkpoint_to_resume_from_that_is_not_there_is_refused(tmp_path, resume):
    from gpt2repro.run.checkpoints import find_checkpoint

    with pytest.raises(ValueError, match=f"resume is .?{resume}"):
        find_checkpoint(tmp_path, resume)


def test_samples_and_validation_that_cannot_work_are_refused_at_the_start(refused, tmp_path, tiny_dataset, capsys):
    (line,) = refused(eval_tokens=31)
    assert "no validation window" in line
    recipe = {**TINY, "dataset_dir": tiny_dataset, "output_dir": tmp_path / "long", "sample_every": 5, "eval_every": 0}
    flags = [word for name, value in recipe.items() for word in (f"--{name}", str(value))]
    assert train_accelerate.main([*flags, "--sample_tokens", "40"]) == 1
    assert "do not fit the model's 32 positions" in capsys.readouterr().err
    assert not list((tmp_path / "long").glob("step-*"))


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(refused, unbroken_run):
    latest = unbroken_run / "latest"
    (line,) = refused(n_embd=64, resume=latest, max_steps=20)
    assert "is not of this model" in line and "size mismatch" in line
    (line,) = refused(resume=latest)
    assert "is at step 8, max_steps is 8: give more steps" in line


def test_weights_of_another_shape_are_refused(refused, unbroken_run):
    (line,) = refused(init_from=unbroken_run / "latest", n_embd=64, output_dir=unbroken_run.parent / "other")
    assert "is of another shape: n_embd is 32 there, 64 here" in line


@pytest.mark.parametrize(
    ("variable", "value", "fields", "expected"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp8", {}, "mixed_precision=fp8: ask for bf16, fp16 or no"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", {"mixed_precision": "no"}, "mixed_precision is no in the recipe"),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "4",
            {},
            "gradient_accumulation_steps=4, the recipe's batch gives 2",
        ),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", {"compile": "false"}, "compile is false in the recipe"),
    ],
)
def test_a_launcher_that_contradicts_the_recipe_is_an_error_that_names_both(
    refused, monkeypatch, variable, value, fields, expected
):
    monkeypatch.setenv(variable, value)
    (line,) = refused(**fields)
    assert expected in line


def test_a_record_of_a_run_that_cannot_be_read_is_refused(refused, tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "run.json").write_text(json.dumps({"recipe": {}}))
    (line,) = refused(output_dir=tmp_path / "odd")
    assert "run.json cannot be read" in line


MISTAKES = [
    # what is wrong with one value of a recipe
    ({"max_steps": "ten"}, 2, "max_steps is 'ten': expected a whole number"),
    ({"max_steps": "1e400"}, 2, "max_steps is '1e400': expected a whole number"),
    ({"max_steps": 8.5}, 2, "max_steps is '8.5': expected a whole number"),
    ({"max_steps": 0}, 1, "max_steps is 0: give at least 1"),
    ({"learning_rate": "nan"}, 2, "learning_rate is 'nan': expected a number"),
    ({"learning_rate": "inf"}, 2, "learning_rate is 'inf': expected a number"),
    ({"learning_rate": -1}, 1, "learning_rate is -1.0: give at least 0"),
    ({"shuffle": 1}, 2, "shuffle is '1': expected true or false"),
    ({"seq_len": 0}, 1, "seq_len is 0: give at least 1"),
    ({"micro_batch_size": -4}, 1, "micro_batch_size is -4: give at least 1"),
    ({"global_batch_tokens": 0}, 1, "global_batch_tokens is 0: give at least 1"),
    ({"global_batch_tokens": "1e18"}, 1, "global_batch_tokens is 1000000000000000000: give at most 4294967296"),
    ({"watchdog_minutes": "1e300"}, 1, "watchdog_minutes is 1e+300: give at most 1000000.0"),
    ({"beta1": 1}, 1, "beta1 is 1.0: give a number from 0 to below 1"),
    ({"dropout": 1}, 1, "dropout is 1.0: give a number from 0 to below 1"),
    ({"min_lr_ratio": 2}, 1, "min_lr_ratio is 2.0: give a number from 0 to 1"),
    ({"warmup_steps": -1}, 1, "warmup_steps is -1: give at least 0"),
    ({"save_every": 0}, 1, "save_every is 0: give at least 1"),
    ({"keep_last": -1}, 1, "keep_last is -1: give at least 0"),
    ({"keep_every": 4}, 1, "keep_every=4 is not a multiple of save_every=3: change one"),
    ({"seed": -1}, 1, "seed is -1: give at least 0"),
    ({"n_head": 0}, 1, "n_head is 0: give a number of at least 1"),
    ({"mixed_precision": "fp8"}, 1, "mixed_precision is 'fp8': give one of auto, no, bf16, fp16"),
    ({"compile": "maybe"}, 1, "compile is 'maybe': give one of auto, true, false"),
    ({"attn_implementation": "flash"}, 1, "attn_implementation is 'flash': give one of sdpa"),
    ({"on_bad_step": "retry"}, 1, "on_bad_step is 'retry': give one of skip, stop"),
    ({"dataset_format": "parquet"}, 1, "dataset_format is 'parquet': give one of auto, gpt2repro"),
    # what is not there
    ({"source": "python-docs"}, 1, "a source without a tokenizer: give a folder, a Hub id, or train:N"),
    ({"source": "nosuch", "tokenizer": "train:300", "dataset_dir": "nowhere"}, 1, "unknown source 'nosuch': one of"),
    (
        {"source": "files", "files": "nowhere/*.txt", "tokenizer": "train:300", "dataset_dir": "nowhere"}, 1,
        "no file matches 'nowhere/*.txt'",
    ),
    ({"resume": "nowhere"}, 1, "resume is 'nowhere', which is no complete checkpoint (no trainer_state.json)"),
    ({"resume": "previous"}, 1, "holds 0 checkpoints: expected two"),
    ({"eval_tasks": "nosuch"}, 1, "no task 'nosuch': there are hellaswag, piqa"),
    ({"eval_tasks": "hellaswag=nowhere.jsonl"}, 1, "No such file or directory: 'nowhere.jsonl'"),
    ({"eval_tasks": "hellaswag:harness:x"}, 1, "hellaswag has no style 'x': it has completion and harness"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "exit_code", "expected"), MISTAKES, ids=[expected for *_, expected in MISTAKES])
def test_a_mistake_in_a_recipe_is_one_line(refused, tmp_path, monkeypatch, fields, exit_code, expected):
    monkeypatch.chdir(tmp_path)
    (line,) = refused(exit_code=exit_code, **fields)
    assert expected in line
    assert not list(tmp_path.iterdir())


def test_a_model_that_no_memory_holds_is_one_line(refused):
    (line,) = refused(vocab_size="1e13")
    assert "can't allocate memory" in line
    assert line.endswith("Lower micro_batch_size, or turn gradient_checkpointing on")


def test_words_that_are_no_flags_are_refused(refused):
    (line,) = refused(exit_code=2, extra=("runs/demo",))
    assert line == "error: 'runs/demo' stands alone on the command line: flags are --field value"


COMMANDS = [
    ("hellaswag", "--model CHECKPOINT --data nowhere.jsonl", 1, "No such file or directory: 'nowhere.jsonl'"),
    ("hellaswag", "--model CHECKPOINT --data prose.txt", 1, "prose.txt, line 1: no JSON"),
    ("hellaswag", "--data prose.txt", 2, "the following arguments are required: --model"),
    ("multiple_choice", "--model CHECKPOINT --task nosuch", 2, "invalid choice: 'nosuch'"),
    ("validation", "--model CHECKPOINT", 2, "one of the arguments --dataset --text/--texts is required"),
    ("validation", "--model CHECKPOINT --text nowhere.txt", 1, "No such file or directory: 'nowhere.txt'"),
    ("validation", "--model CHECKPOINT --text prose.txt --dataset .", 2, "not allowed with argument"),
    ("validation", "--model ./nowhere --text prose.txt", 1, "there is no folder ./nowhere: give a checkpoint folder"),
    ("sample", "--model CHECKPOINT --prompt a --max-new-tokens 0", 1, "give at least 1 of each"),
    ("sample", "--model CHECKPOINT --prompt a --max-new-tokens 99", 1, "do not fit the model's 32 positions"),
]


@pytest.mark.parametrize(("name", "words", "exit_code", "expected"), COMMANDS)
def test_a_mistake_in_measuring_is_one_line(
    unbroken_run, tmp_path, monkeypatch, capsys, name, words, exit_code, expected
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prose.txt").write_text("To be, or not to be")
    words = words.replace("CHECKPOINT", str(unbroken_run / "latest"))
    argv = [*words.split(), *(["--output", "o.json"] if name != "sample" else [])]
    try:
        code = importlib.import_module(f"gpt2repro.eval.{name}").main(argv)
    except SystemExit as usage:  # argparse's
        code = usage.code
    assert code == exit_code
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and expected in last
    assert [path.name for path in tmp_path.iterdir()] == ["prose.txt"]


def test_an_unknown_command_of_the_package_is_one_line(capsys):
    assert command.main(["eval", "nosuch"]) == 2
    assert capsys.readouterr().err == "error: there is no command 'eval nosuch': gpt2repro --help lists them\n"


@pytest.mark.parametrize(
    ("source", "to", "expected"),
    [
        ("nowhere", "gpt2", "nowhere"),
        ("empty", "gpt2", "empty"),
        ("CHECKPOINT", "full", "full is not empty: give a new folder"),
    ],
)
def test_a_mistake_in_converting_is_one_line(unbroken_run, tmp_path, monkeypatch, capsys, source, to, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    source = source.replace("CHECKPOINT", str(unbroken_run / "latest"))
    assert convert.main([source, to, "--to", "gpt2"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and expected in line
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "empty",
        "full",
        "full/mine.txt",
    ]
