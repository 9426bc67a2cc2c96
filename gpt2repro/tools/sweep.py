"""A grid of runs: every combination of some fields, several seeds each, and a table and a picture of the final losses.

    python -m gpt2repro.tools.sweep recipes/demo.yaml --set learning_rate=1e-3,2e-3,4e-3 --seeds 3 --output runs/lr

Each run is a process of train_accelerate.py with its own folder, OUTPUT/FIELD=VALUE,…,seed=N. The same command again
skips finished runs and resumes the others. The seeds are the recipe's and those after it, or those of --set seed=…
When a run fails, the other seeds of its setting are left out. Afterwards OUTPUT holds sweep.json and sweep.png. The
table compares every setting with the best one, seed by seed. --halve spends fewer runs: after every seed only the
better half of the settings goes on. Other flags are fields of the recipe, the same for all runs. On a CPU several
runs at a time (--jobs), each on its share of the cores, have more throughput than one run on all cores.
"""

from gpt2repro import command
from gpt2repro.tools import flags

if command.starting(__name__):
    command.parse_early(lambda: flags.sweep(__doc__, None))

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gpt2repro.data.training_data import open_recipe_dataset
from gpt2repro.files import write_whole
from gpt2repro.recipe import Recipe
from gpt2repro.recipe_parser import parse_recipe, write_recipe
from gpt2repro.run.checkpoints import verify_checkpoint
from gpt2repro.run.folder import RunFolder, differences
from gpt2repro.train.safety import EarlyStop

SCRIPT = Path(__file__).resolve().parents[2] / "train_accelerate.py"

Setting = dict[str, str]  # the fields of --set with one value each
Plan = list[tuple[Setting, Recipe]]  # a run each

# Student's t at 97.5 % for 1 to 9 degrees of freedom; with more, the last is a little too large.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def grid(settings: list[str]) -> list[Setting]:
    """["lr=1,2", "b=3"] -> [{"lr": "1", "b": "3"}, {"lr": "2", "b": "3"}]; UsageError for other than FIELD=VALUES."""
    axes = []
    for setting in settings:
        name, _, values = setting.partition("=")
        if not name or not all(values.split(",")):
            raise command.UsageError(f"--set {setting}: give FIELD=VALUE,VALUE,…")
        axes.append([(name.replace("-", "_"), value) for value in values.split(",")])
    return [dict(point) for point in itertools.product(*axes)]


def plan_runs(
    path: str, fields: list[str], settings: list[str], *, seeds: int, output: str
) -> Iterator[tuple[Setting, Recipe]]:
    """Every run of every setting. `--set seed=…` gives the seeds, else there are `seeds` from the recipe's on.

    Raises:
        UsageError: what `grid` and `parse_recipe` refuse, a field that is the sweep's own, two runs of one folder, or
            runs that cannot be compared.
    """
    for word in (*fields, *(f"--{setting}" for setting in settings)):
        if word.split("=")[0].replace("-", "_") in ("__output_dir", "__recipe"):
            raise command.UsageError(f"{word} cannot be set: every run has the recipe {path} and a folder in {output}")
    folders = set()
    base = ["--recipe", path, *fields]
    first = parse_recipe(base, default=path).seed
    given = [seed for setting in settings if setting.startswith("seed=") for seed in setting[5:].split(",")]
    for setting in grid([setting for setting in settings if not setting.startswith("seed=")]):
        for seed in given or [str(first + number) for number in range(seeds)]:
            values = {**setting, "seed": seed}
            name = ",".join(f"{field}={value}" for field, value in values.items())
            values["output_dir"] = str(Path(output) / name.replace("/", "_"))  # a path as a value stays inside OUTPUT
            if values["output_dir"] in folders:
                raise command.UsageError(f"--set names {values['output_dir']} twice: give every value once")
            folders.add(values["output_dir"])
            flags = [word for field, value in values.items() for word in (f"--{field}", value)]
            recipe = parse_recipe(base + flags, default=path)
            recipe.check()
            if place := recipe.hub_repo_id or recipe.mirror_url():
                raise command.UsageError(f"every run would push to {place}: leave hub_repo_id and mirror out")
            if recipe.max_minutes:
                raise command.UsageError("max_minutes gives every run other steps: give max_steps")
            yield setting, recipe


def is_finished(recipe: Recipe) -> bool:
    """Whether `output_dir` holds the last step of this recipe. The script refuses the folder of another recipe."""
    folder = RunFolder(recipe.output_dir)
    newest, record = folder.find_checkpoint("auto"), folder.record()
    if newest is None or record is None or record["recipe"]["dataset_dir"] != list(recipe.dataset_dir):
        return False
    ended = verify_checkpoint(newest)["step"] == recipe.max_steps or EarlyStop(recipe, folder.rows()).reason()
    return bool(ended) and not differences(record, recipe, record["dataset"])


def run(recipe: Recipe, jobs: int = 1) -> None:
    """Start or resume a run, unless it is finished; OUTPUT_DIR.yaml is its recipe, OUTPUT_DIR.log what it prints.

    jobs: how many runs share the cores; sets OMP_NUM_THREADS where the environment does not.

    Raises:
        ValueError: the run failed.
        KeyboardInterrupt: a signal stopped it.
    """
    if is_finished(recipe):
        return
    written, log = Path(f"{recipe.output_dir}.yaml"), Path(f"{recipe.output_dir}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, written)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    argv, env = [sys.executable, str(SCRIPT), "--recipe", str(written)], {**threads, **os.environ}
    with log.open("ab") as output:
        # Not subprocess.run, which would kill a run that saves its last step after Ctrl-C.
        code = subprocess.Popen(argv, stdout=output, stderr=output, env=env).wait()
    if code in (command.STOPPED_BY_SIGNAL, command.INTERRUPTED):
        raise KeyboardInterrupt
    if code:
        last = (log.read_text(encoding="utf-8", errors="replace").splitlines() or [""])[-1]
        raise ValueError(f"{recipe.output_dir} failed ({last}), see {log}")


def run_all(plan: Plan, jobs: int, failed: list[Setting]) -> Plan:
    """Start or resume the runs, `jobs` at a time; returns those that are finished and adds to `failed`."""

    def finish(setting: Setting, recipe: Recipe) -> bool:
        if setting in failed:
            return False
        try:
            run(recipe, jobs)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # here, before this thread takes the next run
            raise
        except ValueError as error:
            failed.append(setting)
            command.explain(error)
            return False
        mean = summarise(setting, {recipe.seed: recipe.output_dir})["mean"]
        print(f"{recipe.output_dir}: {'no validation' if mean is None else f'{mean:.4f}'}", flush=True)
        return True

    with ThreadPoolExecutor(jobs) as pool:
        finished = list(pool.map(finish, *zip(*plan, strict=True)))
    return list(itertools.compress(plan, finished))


def run_halving(plan: Plan, jobs: int, failed: list[Setting]) -> Plan:
    """Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943) with seeds as the resource.

    Every setting has a run of the first seed. After each seed the better half of the settings goes on to the next one,
    by their mean loss so far; the last two have all seeds.
    """
    finished: Plan = []
    settings = [setting for setting, _ in plan]
    for seed in dict.fromkeys(recipe.seed for _, recipe in plan):
        finished += run_all([run for run in plan if run[1].seed == seed and run[0] in settings], jobs, failed)
        results = [result for result in in_order(summaries(finished)) if result["setting"] in settings]
        settings = [result["setting"] for result in results[: max(2, (len(results) + 1) // 2)]]
    return finished


def summaries(finished: Plan) -> list[dict[str, Any]]:
    """`summarise` of every setting with a finished run."""
    settings: list[Setting] = []
    for setting, _ in finished:
        settings += [setting] if setting not in settings else []
    return [summarise(setting, {recipe.seed: recipe.output_dir for own, recipe in finished if own == setting})
            for setting in settings]  # fmt: skip


def in_order(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best first; a setting with fewer seeds stands after those with more, for it was left out or failed."""
    return sorted(results, key=lambda result: (-len(result["losses"]), result["mean"] or 0.0))


def summarise(setting: Setting, runs: dict[int, str]) -> dict[str, Any]:
    """The final validation losses of a setting's finished runs (folders by seed), their mean and their deviation."""
    rows = {seed: [row for row in RunFolder(folder).rows() if row["kind"] == "val" and row["loss"] is not None]
            for seed, folder in runs.items()}  # fmt: skip
    curves = {seed: [(row["tokens"], row["loss"]) for row in found] for seed, found in rows.items() if found}
    losses = [curve[-1][1] for curve in curves.values()]
    mean, std = fmean(losses) if losses else None, stdev(losses) if len(losses) > 1 else None
    return {
        "setting": setting, "runs": [*runs.values()], "seeds": [*curves], "losses": losses, "mean": mean, "std": std,
        "curves": [*curves.values()],
    }  # fmt: skip


def difference(result: dict[str, Any], best: dict[str, Any]) -> str:
    """How much higher the losses of one setting are than another's for the same seeds: mean and 95 % interval."""
    others = dict(zip(best["seeds"], best["losses"], strict=True))
    pairs = zip(result["seeds"], result["losses"], strict=True)
    differences = [loss - others[seed] for seed, loss in pairs if seed in others]
    if result is best or len(differences) < 2:
        return "–"
    mean, degrees = fmean(differences), len(differences) - 1
    margin = T_QUANTILES[min(degrees, len(T_QUANTILES)) - 1] * stdev(differences) / len(differences) ** 0.5
    told = "" if abs(mean) > margin else "no difference can be told: "
    return f"{told}{mean:+.4f} ({mean - margin:+.4f} to {mean + margin:+.4f})"


def table(results: list[dict[str, Any]]) -> str:
    """The settings, best first, as lines of a Markdown table."""
    names, columns = list(results[0]["setting"]), ["final validation loss", "standard deviation", "seeds"]
    several = len(results) > 1
    head = [*names, *columns, *(["difference from the best (95 % interval)"] if several else [])]
    lines = [head, ["---"] * len(head)]
    ordered = in_order(results)
    for result in ordered:
        mean, std = (f"{result[key]:.4f}" if result[key] is not None else "–" for key in ("mean", "std"))
        compared = [difference(result, ordered[0])] if several else []
        lines.append([*result["setting"].values(), mean, std, str(len(result["losses"])), *compared])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(results: list[dict[str, Any]], png: Path) -> None:
    """Validation loss over tokens: a colour for each setting, a thin line for each seed."""
    figure = Figure(figsize=(7, 4.6), dpi=150, layout="constrained")
    panel = figure.subplots()
    for index, result in enumerate(results):
        name = ", ".join(f"{field} {value}" for field, value in result["setting"].items()) or "all seeds"
        for number, curve in enumerate(result["curves"]):
            points = np.array(curve[1:]).reshape(-1, 2)  # without step 0
            label = None if number else name
            panel.plot(*points.T, color=f"C{index}", linewidth=1, marker="o", markersize=2, label=label)
    panel.set(xlabel="tokens", ylabel="validation loss, nats per token")
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, fontsize=8)
    figure.savefig(png)


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        arguments, fields = flags.sweep(__doc__, argv)
        output, jobs = Path(arguments.output), arguments.jobs
        if min(arguments.seeds, jobs) < 1:
            raise command.UsageError(f"--seeds is {arguments.seeds} and --jobs {jobs}: give at least 1 of each")
        plan = list(plan_runs(arguments.recipe, fields, arguments.set, seeds=arguments.seeds, output=arguments.output))
        seeds = len({recipe.seed for _, recipe in plan})
        if arguments.halve and (seeds < 2 or len(plan) < 3 * seeds):
            raise command.UsageError(
                f"--halve leaves settings out after a seed, and there are {len(plan) // seeds} settings with {seeds} "
                "seeds: give at least 3 settings with --set and 2 --seeds"
            )
        for _, recipe in plan if jobs > 1 else []:
            open_recipe_dataset(recipe)  # several runs cannot prepare it at the same time
        failed: list[Setting] = []
        finished = (run_halving if arguments.halve else run_all)(plan, jobs, failed)
        if not finished:
            return 1  # an earlier sweep.json stays
        results = summaries(finished)
        write_whole(output / "sweep.json", json.dumps(results, indent=1) + "\n")
        draw(results, output / "sweep.png")
        print(f"\n{table(results)}\n\n{output / 'sweep.json'}\n{output / 'sweep.png'}")
        return 1 if failed else 0

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
