"""The doctor: every kind of fault, planted for real, fails its own line and no other."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.data.shards import open_dataset
from gpt2repro.hub import initial
from gpt2repro.recipe import Recipe
from gpt2repro.tools import doctor
from gpt2repro.train.optimizer import make_optimizer
from modeling_gpt2repro import GPT2ReproForCausalLM
from tests.conftest import ROOT

SOUND = {
    "model": "demo", "n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 32, "seq_len": 32,
    "global_batch_tokens": 512, "micro_batch_size": 8, "max_steps": 200, "warmup_steps": 20, "learning_rate": 5e-3,
    "save_every": 100, "mixed_precision": "no", "compile": "false",
}  # fmt: skip


class PlainInit(GPT2ReproForCausalLM):
    """Every matrix starts at 0.02, as where the library's own rule for residual projections never fires."""

    def __init__(self, config):
        super().__init__(config)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                torch.nn.init.normal_(parameter, std=config.initializer_range)


class ShiftsAgain(GPT2ReproForCausalLM):
    """Takes next tokens for the inputs' own labels and shifts them a second time."""

    def forward(self, input_ids, shift_labels=None, **kwargs):
        return super().forward(input_ids, labels=shift_labels, **kwargs)


class Untied(GPT2ReproForCausalLM):
    """A head of its own, equal to the embedding only at first."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.weight = torch.nn.Parameter(self.lm_head.weight.detach().clone())


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models are faster without a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def failing(recipe: Recipe) -> list[str]:
    return [check.name for check in doctor.examine(recipe) if not check.passed]


@pytest.fixture
def sound(tiny_dataset, tmp_path) -> dict:
    return {**SOUND, "dataset_dir": (str(tiny_dataset),), "output_dir": str(tmp_path / "run")}


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ({"shuffle": False}, "shuffling"),
        ({"learning_rate": 5e-2}, "learning rate"),
        ({"warmup_steps": 0}, "warm-up"),
        ({"max_steps": 100_000_000, "save_every": 1, "keep_last": 0}, "disk"),
    ],
)
def test_a_fault_of_the_recipe_fails_its_line_alone(sound, fault, line):
    assert failing(Recipe(**{**sound, **fault})) == [line]


@pytest.mark.parametrize(
    ("fault", "lines"),
    [
        (PlainInit, ["residual init std"]),
        (ShiftsAgain, ["labels"]),
        (Untied, ["tied head", "save and resume"]),  # its head is not saved, and comes back as the embedding
    ],
)
def test_a_fault_of_the_model_fails_its_line(sound, monkeypatch, fault, lines):
    monkeypatch.setattr(initial, "GPT2ReproForCausalLM", fault)
    assert failing(Recipe(**sound)) == lines


def test_the_wrong_tokenizer_ends_the_examination_as_it_would_end_the_run(sound, tiny_dataset, bpe, tmp_path):
    copy = shutil.copytree(tiny_dataset, tmp_path / "copy")
    bpe.save_pretrained(copy)  # has fewer entries, so every id still fits
    with pytest.raises(ValueError, match=f"the tokenizer in {copy} is not the one that made its tokens"):
        failing(Recipe(**{**sound, "dataset_dir": (str(copy),)}))
    bpe.save_pretrained(tmp_path / "named")
    with pytest.raises(ValueError, match=f"tokenizer is {tmp_path / 'named'}, but {tiny_dataset} has another one"):
        failing(Recipe(**{**sound, "tokenizer": str(tmp_path / "named")}))


def test_gradients_that_one_form_of_the_loss_loses_fail_the_first_step_with_its_message(sound, monkeypatch):
    class LosesGradients(GPT2ReproForCausalLM):
        """What a compiler once made of the chunked loss: the right loss, and gradients of zero."""

        def forward(self, *args, loss_impl="plain", **kwargs):
            output = super().forward(*args, loss_impl=loss_impl, **kwargs)
            if loss_impl == "chunked":
                output.loss = output.loss.detach() + 0 * output.loss
            return output

    monkeypatch.setattr(initial, "GPT2ReproForCausalLM", LosesGradients)
    checks = {check.name: check for check in doctor.examine(Recipe(**{**sound, "loss_impl": "chunked"}))}
    failed = [name for name, check in checks.items() if not check.passed]
    assert failed == ["gradient norm", "first step", "overfit one batch"]
    assert "with --loss_impl plain it is right" in checks["first step"].value
    assert failing(Recipe(**sound)) == []


def test_a_cache_that_the_model_does_not_read_fails_its_line(tiny_model):
    class Forgets(GPT2ReproForCausalLM):
        def forward(self, input_ids, past_key_values=None, cache=None, **kwargs):
            return super().forward(input_ids, **kwargs)

    forgets = Forgets(tiny_model.config).eval()
    forgets.load_state_dict(tiny_model.state_dict())
    prompt = torch.tensor([[5, 6, 7, 8]])
    assert doctor.check_cache(tiny_model, prompt).passed
    assert not doctor.check_cache(forgets, prompt).passed


def test_a_run_from_a_checkpoint_compares_its_text_with_and_without_the_cache(sound, tmp_path):
    shape = {name: SOUND[name] for name in ("n_layer", "n_head", "n_embd", "n_positions")}
    GPT2ReproForCausalLM(GPT2ReproConfig(**shape, vocab_size=512)).save_pretrained(tmp_path / "weights")
    names = [check.name for check in doctor.examine(Recipe(**{**sound, "init_from": str(tmp_path / "weights")}))]
    assert "cache" in names and "init std" not in names


def test_damaged_shards_fail_their_line(sound, tiny_dataset, tmp_path):
    copy = shutil.copytree(tiny_dataset, tmp_path / "copy")
    shard = copy / "train-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert not doctor.check_shards(open_dataset(copy)).passed
    with pytest.raises(ValueError, match=r"train-00000\.npy has the sha256"):
        failing(Recipe(**{**sound, "dataset_dir": (str(copy),)}))


def test_targets_that_come_shifted_twice_fail_the_labels_line():
    model = initial.initial_model(Recipe(**SOUND), vocab_size=512, eot_id=0).eval()
    ids = torch.randint(512, (2, 34))
    assert doctor.check_labels(model, ids[:, :32], ids[:, 1:33]).passed
    assert not doctor.check_labels(model, ids[:, :32], ids[:, 2:34]).passed
    assert not doctor.check_labels(model, ids[:, :32], ids[:, :32]).passed


def test_a_checkpoint_that_does_not_bring_the_optimizer_back_fails_the_rehearsal(
    sound, tiny_dataset, tmp_path, monkeypatch
):
    def forgetful(path, *, model, optimizer, accelerator):
        record = load(path, model=model, optimizer=make_optimizer(model, Recipe()), accelerator=accelerator)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return record

    load = doctor.load_checkpoint
    monkeypatch.setattr(doctor, "load_checkpoint", forgetful)
    assert failing(Recipe(**sound)) == ["save and resume"]


def test_a_model_that_cannot_learn_fails_the_overfit_line(sound, monkeypatch):
    still = Recipe(learning_rate=0.0)
    monkeypatch.setattr(doctor, "make_optimizer", lambda model, recipe: make_optimizer(model, still))
    assert failing(Recipe(**sound)) == ["overfit one batch"]


def test_the_rate_is_within_a_half_of_the_gpt3_papers_at_all_its_sizes():
    sizes = (125e6, 350e6, 760e6, 1.3e9, 2.7e9, 6.7e9, 13e9, 175e9)
    rates = (6e-4, 3e-4, 2.5e-4, 2e-4, 1.6e-4, 1.2e-4, 1e-4, 6e-5)
    assert doctor.known_rate(125_000_000) == pytest.approx(6e-4)
    for size, rate in zip(sizes, rates, strict=True):
        assert 0.9 < doctor.known_rate(size) / rate < 1.5


def test_a_dataset_that_is_not_there_is_answered_with_the_whole_command_that_makes_it(tmp_path):
    fields = {"source": "files", "files": ("a book.txt", "b.txt"), "tokenizer": "train:280", "val_tokens": 600}
    recipe = Recipe(**{**SOUND, **fields, "dataset_dir": (str(tmp_path / "none"),)})
    with pytest.raises(ValueError, match="make it first: python -m") as error:
        list(doctor.examine(recipe))
    command = shlex.split(str(error.value).split("make it first: ")[1])
    (tmp_path / "a book.txt").write_text("A pan is a pan, and a man opens it. " * 300)
    (tmp_path / "b.txt").write_text("She said no, and he went home. " * 300)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True, env=environment)
    assert next(doctor.examine(recipe)).passed


@pytest.fixture
def new_precision():
    """Accelerate's state is one for a process: without it, so that a test may ask for another precision."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("new_precision")
def test_the_checks_compute_in_the_recipes_precision(sound, monkeypatch):
    seen = set()

    class Watched(GPT2ReproForCausalLM):
        def forward(self, *args, **kwargs):
            seen.add(torch.is_autocast_enabled("cpu"))
            return super().forward(*args, **kwargs)

    monkeypatch.setattr(initial, "GPT2ReproForCausalLM", Watched)
    monkeypatch.setattr(doctor, "check_first_step", lambda *_, **__: "")  # whose reference is fp32
    assert failing(Recipe(**{**sound, "mixed_precision": "bf16"})) == []
    assert seen == {True}


def test_hours_and_dollars_follow_from_the_speed():
    recipe = Recipe(max_steps=1000, global_batch_tokens=3_600_000)
    check = doctor.check_speed(recipe, 100_000.0, processes=5, mfu=0.4, dollars=2.0)
    assert check.value == "100,000 tokens/s, 2.00 hours on 5, 20.00 dollars, 40.0% MFU"
    assert check.passed
    assert not doctor.check_speed(recipe, 100_000.0, processes=5, mfu=0.1, dollars=None).passed
    assert "dollars" not in doctor.check_speed(recipe, 100_000.0, processes=5, mfu=0.4, dollars=None).value


def test_the_command_passes_a_sound_recipe_with_muon_and_fails_another(sound, tmp_path):
    fields = [word for name, value in sound.items() for word in
              (f"--{name}", value[0] if isinstance(value, tuple) else str(value))]  # fmt: skip
    command = [sys.executable, "-m", "gpt2repro.tools.doctor", "recipes/demo.yaml", *fields, "--source", "null"]
    command += ["--tokenizer", "null", "--optimizer", "muon"]

    def run(*more: str):
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        words = {"cwd": ROOT, "env": one_thread, "capture_output": True, "text": True, "timeout": 600}
        return subprocess.run([*command, *more], **words)

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "every check passed"
    assert len(lines) == 18  # a line a check, and the last
    assert all(line.startswith("PASS") for line in lines[:-1])
    assert list(tmp_path.iterdir()) == []
    done = run("--shuffle", "false")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "1 checks failed"
    done = run("--warmup_stepps", "3")
    assert done.returncode == 2
