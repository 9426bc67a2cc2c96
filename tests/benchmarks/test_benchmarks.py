"""The benchmarks at a tiny size: what they print, what they write, and that a part which fails stops no other."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_suite import PARTS, TINY, run_part
from benchmarks.ladder import RUNGS
from benchmarks.roofline import profiled
from benchmarks.train_throughput import VARIANTS, main
from benchmarks.training_step import Step, Variant, make_nanogpt, step_parser
from benchmarks.waiting import seconds_of
from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.command import EXPLAINED
from gpt2repro.recipe import Recipe
from gpt2repro.recipe_parser import parse_recipe
from gpt2repro.train.optimizer import make_optimizer
from modeling_gpt2repro import GPT2ReproForCausalLM
from tests.conftest import ROOT, train_rows

TINY_FLAGS = ["--device", "cpu", "--model-shape", "demo", "--batch-size", "2", "--seq-len", "32", "--rounds", "3"]


def run(*words: str) -> list[str]:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=1900)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_comparison_prints_ratios_of_neighbouring_steps_and_one_json_line(tmp_path):
    names = ["ours-eager", "ours-eager-chunked", "stock-eager"]
    assert set(names) <= set(VARIANTS)
    flags = [*TINY_FLAGS, "--memory", "--variants", *names, "--json", str(tmp_path / "f.json")]
    lines = run("benchmarks.train_throughput", *flags)
    figures = json.loads(lines[-1])
    assert figures == json.loads((tmp_path / "f.json").read_text())
    assert {"commit", "hardware", "torch", "transformers"} <= figures["machine"].keys()
    clocks = {name: figures["ways"][name]["clock_seconds"] for name in names}
    ratios = sorted(theirs / ours for ours, theirs in zip(clocks["ours-eager"], clocks["stock-eager"], strict=True))
    assert figures["ratios"]["ours-eager / stock-eager"]["median"] == pytest.approx(ratios[1])
    for row in figures["ways"].values():
        assert row["tokens_per_second"] * row["ms"] / 1000 == pytest.approx(64)
        assert row["mfu"] == "unknown"
        if sys.platform == "linux":
            assert row["above_state_bytes"] > 0


NANOGPT = os.environ.get("NANOGPT_MODEL")  # model.py of a checkout of nanoGPT


@pytest.mark.skipif(NANOGPT is None, reason="no nanoGPT: set NANOGPT_MODEL to its model.py")
def test_nanogpts_model_takes_the_same_step_as_ours_with_its_weights():
    arguments = step_parser("").parse_args([*TINY_FLAGS, "--seq-len", "64"])
    arguments.nanogpt = NANOGPT
    theirs = Step(Variant(model="nanogpt", precision="fp32", compile_mode=None), arguments)
    ours = Step(Variant(precision="fp32", compile_mode=None), arguments)
    config = GPT2ReproConfig(**ours.shape, vocab_size=50304, activation_function="gelu")
    ours.model = GPT2ReproForCausalLM(config)
    ours.model.load_state_dict(theirs.model.state_dict())
    ours.optimizer = make_optimizer(ours.model, Recipe(learning_rate=6e-4))
    ours.inputs, ours.options["shift_labels"] = theirs.inputs, theirs.options["targets"]
    assert [theirs() for _ in range(3)] == pytest.approx([ours() for _ in range(3)], rel=1e-6)
    assert all(group["fused"] for group in theirs.optimizer.param_groups)


def test_a_rival_that_is_missing_or_computes_another_function_is_refused(tmp_path, capsys):
    assert main([*TINY_FLAGS, "--nanogpt", str(tmp_path / "model.py")]) == EXPLAINED
    assert capsys.readouterr().err == f"error: there is no {tmp_path}/model.py: give nanoGPT's model.py\n"
    (tmp_path / "model.py").write_text(
        "import types, torch\n"
        "GPTConfig = lambda **sizes: types.SimpleNamespace(vocab_size=64, **sizes)\n"
        "class GPT(torch.nn.Module):\n"
        "    def __init__(self, config):\n"
        "        super().__init__()\n"
        "        self.config = config\n"
        "    def load_state_dict(self, state): pass\n"
        "    def forward(self, inputs, targets): return None, torch.tensor(4.0)\n"
    )
    with pytest.raises(ValueError, match=r"is another model: with the same weights its loss is 4\.0, ours 4\.08"):
        make_nanogpt(str(tmp_path / "model.py"), {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8},
                     torch.arange(8)[None])  # fmt: skip


def test_the_roofline_counts_the_flops_of_a_step_and_its_parts_are_no_longer_than_the_step():
    step = Step(Variant(precision="fp32", compile_mode=None), step_parser("").parse_args(TINY_FLAGS))
    whole, matmuls, parts, _ = profiled(step)
    assert 0.5 * whole < sum(seconds for _, seconds in matmuls.values()) + sum(parts.values()) <= whole
    with FlopCounterMode(display=False) as counter:
        step()
    counted = counter.get_flop_counts()["Global"]
    attention = sum(flops for name, flops in counted.items() if "attention" in str(name))
    flops = sum(calls * 2 * math.prod(shape) for shape, (calls, _) in matmuls.items())
    assert flops == sum(counted.values()) - attention
    assert parts["optimizer"] > 0 and parts["clip"] > 0


@pytest.mark.slow
def test_the_waits_at_a_tiny_size_end_and_a_warm_start_is_faster_than_a_cold_one(tmp_path):
    run("benchmarks.waiting", "--model", "demo", "--repeats", "1", "--json", str(tmp_path / "f.json"))
    seconds = {name: times[0] for name, times in json.loads((tmp_path / "f.json").read_text())["seconds"].items()}
    assert 0 < seconds["--help"] < seconds["import modeling_gpt2repro"]
    assert seconds["step 1, compiled, warm cache"] < seconds["step 1, compiled, cold cache"]


def test_a_wait_for_a_process_that_fails_is_an_error_and_no_figure():
    with pytest.raises(ValueError, match=r"ended with 3, expected 0:\nwhy"):
        seconds_of(["-c", "import sys; sys.stderr.write('why'); sys.exit(3)"])


@pytest.mark.slow
def test_the_ladder_names_every_rung_and_says_which_do_not_apply(tmp_path):
    run("benchmarks.ladder", *TINY_FLAGS, "--json", str(tmp_path / "ladder.json"))
    rows = json.loads((tmp_path / "ladder.json").read_text())["rungs"]
    assert [row["rung"] for row in rows] == [name for name, _, _ in RUNGS]
    assert [row["rung"] for row in rows if "skipped" in row] == ["TF32"]
    assert rows[1]["lecture_gain"] == pytest.approx(1000 / 333)
    assert rows[3]["gain"] == pytest.approx(rows[2]["ms"] / rows[3]["ms"])


def test_a_part_that_fails_or_hangs_is_reported_and_figures_come_back(tmp_path):
    def run_code(code: str, seconds: float = 600) -> dict:
        return run_part("part", ["-c", code], tmp_path / "log", seconds=seconds)

    assert run_code("raise SystemExit(3)")["ended"] == "exit code 3"
    assert run_code("import time; time.sleep(3600)", seconds=0.5)["ended"] == "cut off"
    done = run_code("print('seen'); print('{\"tokens_per_second\": 3}')")
    assert (done["ended"], done["figures"]) == ("done", {"tokens_per_second": 3})
    assert "seen" in (tmp_path / "log").read_text()


def test_a_part_that_is_cut_off_leaves_no_process_behind(tmp_path):
    code = "import subprocess as s; child = s.Popen(['sleep', '600']); print(child.pid, flush=True); child.wait()"
    assert run_part("part", ["-c", code], tmp_path / "log", seconds=3)["ended"] == "cut off"
    child = int((tmp_path / "log").read_text().split()[-1])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("name", PARTS.keys() - {"optimizers"})
@pytest.mark.parametrize("tiny", [False, True])
def test_the_options_of_every_part_exist(name, tiny):
    _, module, *words = f"{PARTS[name]} {TINY.get(name, '') if tiny else ''}".split()
    if module.startswith("benchmarks."):
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(module).main([*words, "--help"])
        assert stopped.value.code == 0
    elif module == "train_accelerate":
        parse_recipe(words, default="").check()


def test_the_suite_needs_no_package_that_a_bare_gpu_machine_lacks():
    code = (
        "import sys\n"
        "for name in ('datasets', 'evaluate', 'lm_eval', 'pandas', 'pyarrow', 'zstandard', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import benchmarks.gpu_suite, benchmarks.ladder, benchmarks.train_throughput, benchmarks.generation\n"
        "import benchmarks.eval_throughput\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)


@pytest.mark.slow
def test_the_whole_suite_runs_at_a_tiny_size_and_writes_three_files(tmp_path, tiny_dataset):
    run("benchmarks.gpu_suite", "--tiny", "--output", str(tmp_path), "--dataset", str(tiny_dataset), "--minutes", "30")
    parts = json.loads((tmp_path / "suite.json").read_text())["parts"]
    assert {part["ended"] for part in parts} == {"done"}, parts
    assert {path.name for path in tmp_path.iterdir()} == {"suite.json", "suite.log", "training.jsonl"}


@pytest.mark.slow
def test_the_comparison_of_the_optimizers_runs_at_a_tiny_size_and_draws_a_picture(tmp_path, tiny_dataset):
    out, options = str(tmp_path / "out"), ["--dataset", str(tiny_dataset), "--minutes", "30"]
    run("benchmarks.gpu_suite", "--tiny", "--only", "optimizers", "--output", out, *options)
    assert (tmp_path / "out" / "optimizers" / "optimizers.png").read_bytes().startswith(b"\x89PNG")
    log = (tmp_path / "out" / "suite.log").read_text()
    assert "| AdamW | " in log and "| Muon pack | " in log


def test_two_processes_with_the_chunked_loss_learn_what_one_with_the_plain_loss_does(
    train_script, unbroken_run, tmp_path
):
    train_script(tmp_path / "run", processes=2, loss_impl="chunked")
    expected, actual = train_rows(unbroken_run), train_rows(tmp_path / "run")
    for step, row in expected.items():
        assert actual[step]["loss"] == pytest.approx(row["loss"], abs=2e-5)


def test_a_profiled_run_writes_a_trace_and_names_its_costliest_kernels(train_script, tmp_path):
    output = train_script(tmp_path / "run", profile_steps=2)
    assert json.loads((tmp_path / "run" / "profile.json").read_text())["traceEvents"]
    rows = re.findall(r"^ *(\S[^\r\n]*?)  +([\d.]+)%  ", output[output.index("Self CPU %") :], flags=re.MULTILINE)
    shares = [float(share) for _, share in rows]
    assert len(rows) == 10 and shares == sorted(shares, reverse=True) and 20 < sum(shares) <= 100.5
    assert any("aten::mm" in name for name, _ in rows)
    assert "trace of 2 steps in profile.json" in output
    shutil.rmtree(tmp_path / "run" / "step-00000008")  # what is left after step 6 is less than four and two steps
    resumed = train_script(tmp_path / "run", profile_steps=2)
    assert "no profile: profile_steps=2 follow 4 other steps, and 2 are left" in resumed
