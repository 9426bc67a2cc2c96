"""A sweep of real runs: what it starts, passes over, resumes and writes."""

import json
import os
import shutil
import subprocess
import sys
from statistics import fmean, stdev

import numpy as np
import pytest
import yaml

from gpt2repro.command import UsageError
from gpt2repro.recipe import Recipe
from gpt2repro.tools.sweep import difference, grid, main, plan_runs, table
from tests.conftest import ENVIRONMENT, ROOT, TINY, train_rows

VALUES = ("0.001", "0.003")


@pytest.fixture(scope="module")
def sweep(tiny_dataset, tmp_path_factory):
    """A function that runs the sweep command over a tiny recipe; returns what it printed."""
    folder = tmp_path_factory.mktemp("sweep")
    recipe = {**TINY, "dataset_dir": str(tiny_dataset), "max_steps": 4}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))

    def run(*extra: str, exit_code: int = 0) -> str:
        command = [sys.executable, "-m", "gpt2repro.tools.sweep", str(folder / "tiny.yaml"),
                   "--output", str(folder / "out"), *extra]  # fmt: skip
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=1200,
            env={**os.environ, **ENVIRONMENT},
        )  # fmt: skip
        assert done.returncode == exit_code, done.stdout + done.stderr
        return done.stdout + done.stderr

    run.output = folder / "out"
    return run


@pytest.fixture(scope="module")
def finished(sweep):
    return sweep("--set", f"learning_rate={','.join(VALUES)}", "--seeds", "2")


def test_every_setting_and_seed_is_a_run_of_its_own(sweep, finished):
    for value in VALUES:
        for seed in (1337, 1338):
            run = sweep.output / f"learning_rate={value},seed={seed}"
            assert train_rows(run).keys() == {1, 2, 3, 4}
            recipe = json.loads((run / "run.json").read_text())["recipe"]
            assert (recipe["learning_rate"], recipe["seed"]) == (float(value), seed)


def test_the_table_has_the_mean_and_spread_of_the_runs_final_losses_best_first(sweep, finished):
    results = json.loads((sweep.output / "sweep.json").read_text())
    for result in results:
        stem = f"learning_rate={result['setting']['learning_rate']},seed="
        losses = [train_rows(sweep.output / f"{stem}{seed}", "val")[4]["loss"] for seed in (1337, 1338)]
        assert result["losses"] == losses
        assert (result["mean"], result["std"]) == (fmean(losses), stdev(losses))
        assert f"| {fmean(losses):.4f} | {stdev(losses):.4f} | 2 |" in finished
    lines = [line for line in finished.splitlines() if line.startswith("| 0.")]
    assert len(lines) == 2
    assert lines == sorted(lines, key=lambda line: float(line.split(" | ")[1]))
    assert (sweep.output / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_passes_over_what_is_finished_and_goes_on_with_what_is_not(sweep, finished):
    done, broken = (sweep.output / f"learning_rate={value},seed=1337" for value in VALUES)
    expected = train_rows(broken)[4]["loss"]
    shutil.rmtree(broken / "step-00000004")
    before = json.loads((done / "run.json").read_text())
    again = sweep("--set", f"learning_rate={','.join(VALUES)}", "--seeds", "2")
    assert again == finished
    assert json.loads((done / "run.json").read_text()) == before
    assert len(json.loads((broken / "run.json").read_text())["starts"]) == 2
    assert train_rows(broken)[4]["loss"] == pytest.approx(expected, abs=1e-5)


def test_halving_leaves_the_worst_setting_out_after_the_first_seed(sweep, finished):
    output = sweep("--set", f"learning_rate=1e-9,{','.join(VALUES)}", "--seeds", "2", "--halve")
    assert (sweep.output / "learning_rate=1e-9,seed=1337" / "run.json").exists()
    assert not (sweep.output / "learning_rate=1e-9,seed=1338").exists()
    lines = [line.split(" | ") for line in output.splitlines() if line.startswith(("| 0.", "| 1e-9"))]
    assert [line[3] for line in lines] == ["2", "2", "1"]
    assert lines[2][0] == "| 1e-9"


@pytest.mark.parametrize("words", [["learning_rate=1,2,3"], ["learning_rate=1,2", "--seeds", "2"]])
def test_halving_of_too_few_settings_or_seeds_is_refused(sweep, words):
    assert "give at least 3 settings" in sweep("--set", *words, "--halve", exit_code=2)


def test_a_run_of_another_recipe_fails_and_an_earlier_table_stays(sweep, finished):
    before = (sweep.output / "sweep.json").read_text()
    output = sweep("--set", "learning_rate=0.001", "--beta1", "0.8", exit_code=1)
    assert "learning_rate=0.001,seed=1337 failed (error: output_dir" in output
    assert "beta1 is 0.9 there and 0.8 here" in output
    log = sweep.output / "learning_rate=0.001,seed=1337.log"
    assert "beta1 is 0.9 there and 0.8 here" in log.read_text()
    assert (sweep.output / "sweep.json").read_text() == before


def test_an_unknown_field_is_an_error_before_anything_starts(sweep, finished):
    output = sweep("--set", "learning_rat=1,2", "--output", str(sweep.output / "new"), exit_code=2)
    assert output == "error: unknown flag: --learning_rat; did you mean learning_rate?\n"
    assert not (sweep.output / "new").exists()


def test_a_grid_is_every_combination_of_its_fields():
    assert grid(["a=1,2", "b-c=x"]) == [{"a": "1", "b_c": "x"}, {"a": "2", "b_c": "x"}]
    with pytest.raises(ValueError, match="--set a=1,: give FIELD=VALUE"):
        grid(["a=1,"])


def planned(*settings: str, seeds: int = 1) -> list[tuple[dict, Recipe]]:
    return list(plan_runs(str(ROOT / "recipes" / "demo.yaml"), [], list(settings), seeds=seeds, output="runs/x"))


def test_seeds_are_the_recipes_and_those_after_it_or_the_ones_of_set():
    assert [recipe.seed for _, recipe in planned("beta1=0.8", seeds=3)] == [1337, 1338, 1339]
    runs = planned("seed=5,9", "beta1=0.8,0.9", seeds=3)
    assert [(setting, recipe.seed) for setting, recipe in runs] == [
        ({"beta1": "0.8"}, 5), ({"beta1": "0.8"}, 9), ({"beta1": "0.9"}, 5), ({"beta1": "0.9"}, 9),
    ]  # fmt: skip


def test_every_run_has_a_folder_of_its_own_name_inside_the_output():
    folders = [recipe.output_dir for _, recipe in planned("init_from=../a,/b/c", seeds=2)]
    assert folders == [f"runs/x/init_from={name},seed={seed}" for name in (".._a", "_b_c") for seed in (1337, 1338)]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["learning_rate=1,1"], "--set names runs/x/learning_rate=1,seed=1337 twice: give every value once"),
        (["init_from=a/b,a_b"], "--set names runs/x/init_from=a_b,seed=1337 twice"),
        (["seed=1", "seed=1"], "twice"),
        (["seed="], "seed is '': expected a whole number"),
        (["learning_rate="], "give FIELD=VALUE,VALUE"),
        (["../x=1"], "unknown flag"),
        (["output_dir=a,b"], "--output_dir=a,b cannot be set"),
        (["output-dir=a,b"], "--output-dir=a,b cannot be set"),
        (["hub_repo_id=me/x"], "every run would push to me/x"),
        (["mirror=file:///x"], "every run would push to file:///x"),
        (["max_minutes=3"], "max_minutes gives every run other steps"),
    ],
)
def test_a_setting_that_names_no_runs_or_one_twice_is_refused(words, problem):
    with pytest.raises(UsageError, match=problem):
        planned(*words)


def result(name: str, losses: dict[int, float]) -> dict:
    """A setting's summary with the final losses of some seeds."""
    mean, std = fmean(losses.values()) if losses else None, stdev(losses.values()) if len(losses) > 1 else None
    return {"setting": {"lr": name}, "mean": mean, "std": std, "seeds": [*losses], "losses": [*losses.values()]}


def test_a_setting_whose_runs_failed_stands_last_in_the_table():
    lines = table([result("9", {}), result("1", {1337: 3.0})]).splitlines()
    assert lines[2:] == ["| 1 | 3.0000 | – | 1 | – |", "| 9 | – | – | 0 | – |"]


def test_a_setting_is_compared_with_the_best_seed_by_seed_as_by_a_paired_t_test():
    rng = np.random.default_rng(0)
    best = {seed: 3.0 + rng.normal() for seed in range(5)}  # the seeds differ much, the settings do not
    worse = {seed: loss + 0.02 + 0.005 * rng.normal() for seed, loss in best.items()}
    differences = np.array([worse[seed] - best[seed] for seed in best])
    margin = 2.776445 * differences.std(ddof=1) / 5**0.5  # the t distribution's 97.5 % point with 4 degrees
    mean = differences.mean()
    expected = f"| {mean:+.4f} ({mean - margin:+.4f} to {mean + margin:+.4f}) |"
    assert table([result("2", worse), result("1", best)]).splitlines()[3].endswith(expected)


def test_a_difference_is_told_only_if_its_interval_leaves_zero_out():
    best, other = {1: 3.0, 2: 3.1, 3: 3.2}, {1: 3.2, 2: 3.0, 3: 3.25, 4: 9.0}  # seed 4 has no partner
    assert "no difference can be told: +0.0500 (" in difference(result("2", other), result("1", best))
    assert difference(result("2", {1: 3.5}), result("1", best)) == "–"
    assert difference(result("2", {1: 3.5, 2: 3.6, 3: 3.7}), result("1", best)) == "+0.5000 (+0.5000 to +0.5000)"


def test_a_run_that_was_stopped_is_the_last_one_that_starts(sweep, monkeypatch):
    started = []

    def stopped_by_a_signal(recipe, jobs):
        started.append(recipe.output_dir)
        raise KeyboardInterrupt

    monkeypatch.setattr("gpt2repro.tools.sweep.run", stopped_by_a_signal)
    recipe, output = sweep.output.parent / "tiny.yaml", sweep.output.parent / "stopped"
    assert main([str(recipe), "--set", "learning_rate=1e-3,2e-3", "--output", str(output)]) == 130
    assert len(started) == 1


def test_runs_at_one_time_need_a_dataset_that_is_there(sweep, tmp_path):
    fields = ["--source", "python-docs", "--tokenizer", "train:512", "--dataset_dir", str(tmp_path / "none")]
    printed = sweep("--set", "learning_rate=1e-3,2e-3", "--jobs", "2", *fields, exit_code=1)
    assert f"error: {tmp_path / 'none'} does not exist; prepare it" in printed
