"""Every recipe and launcher configuration that the project ships can be used as it is."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.recipe import Recipe
from gpt2repro.recipe_parser import DEFAULT_RECIPE, parse_recipe
from gpt2repro.tools.doctor import check_learning_rate, check_warmup
from gpt2repro.train.estimates import PEAK_FLOPS, flops_per_token
from modeling_gpt2repro import GPT2ReproForCausalLM
from tests.conftest import ENVIRONMENT, ROOT, end, train_rows, wait_until

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_no_problem(path):
    recipe = parse_recipe(["--recipe", str(path)], default=DEFAULT_RECIPE)
    for_eight = recipe.model == "gpt2" and path.stem not in ("gpt2-124m-1gpu", "gpt2-124m-4090")
    for world_size in (1, 8) if for_eight else (1,):
        recipe.check(world_size=world_size)


def test_the_reproduction_is_the_gpt3_papers_hyperparameters():
    recipe = parse_recipe(["--recipe", str(ROOT / "recipes" / "gpt2-124m-10b.yaml")], default=DEFAULT_RECIPE)
    assert recipe.max_steps * recipe.global_batch_tokens == 9_999_745_024
    assert (recipe.learning_rate, recipe.beta1, recipe.beta2, recipe.weight_decay) == (6e-4, 0.9, 0.95, 0.1)
    assert recipe.warmup_steps == 375_000_000 // recipe.global_batch_tokens
    assert (recipe.grad_clip, recipe.min_lr_ratio, recipe.schedule) == (1.0, 0.1, "cosine")


def test_the_command_line_overrides_a_recipe():
    argv = ["--recipe", str(ROOT / "recipes" / "demo.yaml"), "--learning-rate=6e-4", "--max_steps", "1_000",
            "--files", "a.txt", "b.txt", "--shuffle", "false"]  # fmt: skip
    recipe = parse_recipe(argv, default=DEFAULT_RECIPE)
    assert (recipe.learning_rate, recipe.max_steps, recipe.shuffle) == (6e-4, 1000, False)
    assert recipe.files == ("a.txt", "b.txt")
    assert recipe.model == "demo"


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_a_launcher_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]


# ---- the numbers in the headers ------------------------------------------------------------------------------


def number(text: str) -> float:
    return float(text.replace(",", ""))


def header_and_costs(path: Path) -> tuple[str, Recipe, dict[str, float]]:
    """A recipe's comment lines joined, the recipe, and what the code says of it."""
    header = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    recipe = parse_recipe(["--recipe", str(path)], default=DEFAULT_RECIPE)
    trained = (recipe.tokenizer or "").startswith("train:")
    vocab_size = int(recipe.tokenizer.removeprefix("train:")) if trained else 50257
    config = GPT2ReproConfig(**recipe.shape(), vocab_size=vocab_size)
    with torch.device("meta"):
        n_parameters = GPT2ReproForCausalLM(config).num_parameters()
    per_token = flops_per_token(
        n_parameters=n_parameters, n_positions=config.n_positions, n_layer=config.n_layer, n_embd=config.n_embd,
        seq_len=recipe.seq_len,
    )  # fmt: skip
    tokens = recipe.max_steps * recipe.global_batch_tokens
    costs = {"parameters": n_parameters, "per_token": per_token, "tokens": tokens, "flops": per_token * tokens}
    return header, recipe, costs


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_parameters_tokens_and_flops_in_a_header_follow_from_the_code(path):
    header, recipe, costs = header_and_costs(path)
    assert number(re.search(r"Parameters: ([\d,]+)\.", header)[1]) == costs["parameters"]
    tokens = re.search(r"Tokens: ([\d,]+) \* ([\d,]+) = ([\d,]+)\.", header)
    assert [number(part) for part in tokens.groups()] == [
        recipe.max_steps, recipe.global_batch_tokens, costs["tokens"],
    ]  # fmt: skip
    flops = re.search(r"FLOPs: ([\d,]+) a token \(PaLM's count\), ([\d.e+]+)\.", header)
    assert (number(flops[1]), flops[2]) == (costs["per_token"], f"{costs['flops']:.2e}")


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem.startswith("gpt2-")], ids=lambda path: path.stem)
def test_hours_in_a_header_follow_from_its_mfu_and_the_mfu_from_the_speed_it_cites(path):
    header, recipe, costs = header_and_costs(path)
    line = r"(A100|H100|RTX 4090): ([\d.]+) % MFU \((.*?)\); ([\d.]+) hours on 1(?:, ([\d.]+) on 8)?"
    cards = re.findall(line, header)
    assert [card for card, *_ in cards] == ["A100", "H100", *(["RTX 4090"] if path.stem.endswith("4090") else [])]
    for card, mfu, source, on_1, on_8 in cards:
        hours = costs["flops"] / (float(mfu) / 100 * PEAK_FLOPS[card]) / 3600
        assert (on_1, on_8) == (f"{hours:.1f}", f"{hours / 8:.1f}" if on_8 else "")
        if price := re.search(rf"{card} (\d+) at ([\d.]+) an hour", header):
            assert price[1] == f"{hours * float(price[2]):.0f}"
        if speed := re.search(r"([\d.]+)k tokens/s a card", source):
            tokens_per_second = 1000 * float(speed[1])
        elif step := re.search(r"([\d.]+) (ms|s) a step on 8", source):
            tokens_per_second = recipe.global_batch_tokens / 8 / (float(step[1]) * {"ms": 1e-3, "s": 1}[step[2]])
        else:
            assert source in ("taken from llm.c's 124M", "taken from llm.c's 774M")
            assert mfu == {"124M": "40.5", "774M": "64.3"}[source[-4:]]
            continue
        assert mfu == f"{100 * tokens_per_second * costs['per_token'] / PEAK_FLOPS[card]:.1f}"


@pytest.mark.parametrize("stem", ["gpt2-124m-muon", "gpt2-124m-speedrun"])
def test_muons_own_matmuls_cost_what_its_recipe_says(stem):
    header, recipe, costs = header_and_costs(ROOT / "recipes" / f"{stem}.yaml")
    assert recipe.muon_split_qkv
    C, n_layer = 768, 12
    flops = 0
    for n, m in (*[(C, C)] * 4, (C, 4 * C), (C, 4 * C)):  # X X^T, its square, and that times X, five times
        flops += n_layer * 5 * (2 * n * n * m + 2 * n**3 + 2 * n * n * m)
    own = re.search(r"([\d.e+]+) FLOPs a step on every card.*: ([\d.]+) % on 1, ([\d.]+) % on 8", header)
    share = flops / (costs["per_token"] * recipe.global_batch_tokens)
    assert own.groups() == (f"{flops:.2e}", f"{100 * share:.1f}", f"{100 * share * 8:.1f}")


def test_muons_rate_and_decay_are_the_public_tracks_in_our_convention():
    """Its update of A x B has the size 1 * max(1, A / B)**0.5 for a rate of 0.025, ours 0.2 * max(A, B)**0.5."""
    recipe = parse_recipe(["--recipe", str(ROOT / "recipes" / "gpt2-124m-muon.yaml")], default=DEFAULT_RECIPE)
    assert recipe.muon_learning_rate == pytest.approx(0.025 / (0.2 * 768**0.5), rel=0.01)
    assert recipe.muon_weight_decay == pytest.approx(0.025 * 0.05 / recipe.muon_learning_rate, rel=0.01)


@pytest.mark.parametrize("stem", ["gpt2-124m-1gpu", "gpt2-124m-4090"])
def test_batch_beta2_and_rate_of_the_recipes_for_one_card_follow_their_rule(stem):
    recipe = parse_recipe(["--recipe", str(ROOT / "recipes" / f"{stem}.yaml")], default=DEFAULT_RECIPE)
    best = 2**19 * (recipe.max_steps * recipe.global_batch_tokens / 300e9) ** 0.383
    assert recipe.global_batch_tokens == 2 ** int(math.log2(best))
    share = recipe.global_batch_tokens / 2**19
    assert recipe.beta2 == pytest.approx(0.95**share, abs=5e-6)
    assert recipe.learning_rate == pytest.approx(1e-3 * share**0.5, rel=0.02)
    assert recipe.accumulation_steps(1) <= 2


@pytest.mark.parametrize(
    ("stem", "rate", "batch_tokens"),  # table 2.1 of the GPT-3 paper: 125M, 350M, 760M, 1.3B
    [("gpt2-124m-10b", 6e-4, 2**19), ("gpt2-124m-40b", 6e-4, 2**19), ("gpt2-350m", 3e-4, 2**19),
     ("gpt2-774m", 2.5e-4, 2**19), ("gpt2-1558m", 2e-4, 2**20)],
)  # fmt: skip
def test_rate_batch_and_warmup_are_the_gpt3_papers(stem, rate, batch_tokens):
    recipe = parse_recipe(["--recipe", str(ROOT / "recipes" / f"{stem}.yaml")], default=DEFAULT_RECIPE)
    assert (recipe.learning_rate, recipe.global_batch_tokens) == (rate, batch_tokens)
    assert recipe.warmup_steps == 375_000_000 // batch_tokens
    assert recipe.min_lr_ratio == 0.1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_doctor_accepts_a_recipes_rate_and_warmup(path):
    _, recipe, costs = header_and_costs(path)
    assert check_learning_rate(recipe, costs["parameters"]).passed
    assert check_warmup(recipe).passed


# ---- every recipe starts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(tiny_dataset, tmp_path_factory) -> Path:
    """A folder with two steps of every recipe, at a size that takes no time, all in one process."""
    folder = tmp_path_factory.mktemp("recipes")
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**shape, vocab_size=512)).save_pretrained(folder / "stock")
    small = {**shape, "seq_len": 32, "global_batch_tokens": 128, "micro_batch_size": 2, "max_steps": 2,
             "warmup_steps": 0, "eval_tokens": 256, "sample_tokens": 2, "dataset_dir": tiny_dataset, "source": "null",
             "tokenizer": "null", "val_tokens": "null", "mixed_precision": "no"}  # fmt: skip
    flags = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    commands = []
    for path in RECIPES:
        command = ["--recipe", str(path), *flags, "--output_dir", str(folder / path.stem), "--eval_tasks", "--files"]
        command += ["--init_from", str(folder / "stock")] if path.stem == "shakespeare-finetune" else []
        commands.append(command)
    code = f"import train_accelerate\nassert [train_accelerate.main(c) for c in {commands!r}] == [0] * {len(commands)}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_two_steps_at_a_reduced_size(path, started):
    recipe = parse_recipe(["--recipe", str(path)], default=DEFAULT_RECIPE)
    rows = train_rows(started / path.stem)
    assert rows.keys() == {1, 2}
    assert rows[1]["lr"] == pytest.approx(recipe.learning_rate)
    assert (started / path.stem / "latest" / "model.safetensors").is_file()
    assert set(train_rows(started / path.stem, "val")) == {0, 2}


# ---- the restart loop ----------------------------------------------------------------------------------------

RUN = ROOT / "recipes" / "run.sh"


# The codes with which a command ends, one after the other: the exit code of run.sh, and how often it starts it.
LOOPS = {(0,): (0, 1), (75, 1, 0): (0, 3), (2, 0): (2, 1), (1, 1, 1, 0): (1, 3), (75, 75, 75, 75, 0): (0, 5)}


@pytest.fixture(scope="module")
def loops(tmp_path_factory) -> dict[tuple[int, ...], tuple[int, int]]:
    """What came of LOOPS; all at one time, since run.sh waits between two starts."""
    folder = tmp_path_factory.mktemp("loops")
    processes, counts = {}, {}
    for codes in LOOPS:
        script, counts[codes] = folder / f"{codes}.sh", folder / f"{codes}"
        script.write_text(
            f"codes=({' '.join(map(str, codes))})\ncount=$(cat '{counts[codes]}' 2>/dev/null || echo 0)\n"
            f"echo $((count + 1)) > '{counts[codes]}'\nexit \"${{codes[$count]}}\"\n"
        )
        processes[codes] = subprocess.Popen([RUN, "bash", str(script)], stderr=subprocess.DEVNULL)
    for process in processes.values():
        end(process)
    return {codes: (process.returncode, int(counts[codes].read_text())) for codes, process in processes.items()}


@pytest.mark.parametrize("codes", LOOPS)
def test_the_loop_starts_a_run_again_until_it_is_done_or_fails_at_once(loops, codes):
    assert loops[codes] == LOOPS[codes]


def test_the_loop_passes_a_signal_on_and_does_not_start_again(tmp_path):
    started = tmp_path / "started"
    command = f"trap 'exit 75' TERM; echo x >> {started}; for _ in $(seq 200); do sleep 0.1; done"
    process = subprocess.Popen([RUN, "bash", "-c", command])
    wait_until(started.exists, process)
    process.send_signal(signal.SIGTERM)
    end(process)
    assert process.returncode == 75
    assert started.read_text() == "x\n"


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    scripts = [ROOT / "accelerate_configs" / "slurm.sbatch", *ROOT.glob("recipes/*.sh"), *ROOT.glob("benchmarks/*.sh")]
    subprocess.run([shellcheck, *scripts], check=True)
