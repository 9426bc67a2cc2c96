"""A grid of runs: one field after another, several seeds, a table and a picture of what came out.

    python -m gpt2repro.tools.sweep recipes/demo.yaml --set learning_rate=1e-3,2e-3,4e-3 --seeds 3 --output runs/lr

Every run is a process of train_accelerate.py of its own with its own folder, OUTPUT/FIELD=VALUE,…/seed-N. The same
command again goes on: finished runs are passed over, broken ones resume. Of a setting whose run fails the other seeds
are left out, and the sweep goes on with the next. Afterwards OUTPUT holds sweep.json and sweep.png. Other flags are
fields of the recipe, the same for all runs. On a CPU several runs at a time (--jobs), each on its share of the cores,
do more in all than one on every core.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from gpt2repro.command import STOPPED_BY_SIGNAL
from gpt2repro.recipe import DEFINING_FIELDS, Recipe, parse_recipe
from gpt2repro.run.checkpoints import find_checkpoint
from gpt2repro.run.metrics import read_metrics

SCRIPT = Path(__file__).resolve().parents[2] / "train_accelerate.py"


def grid(settings: list[str]) -> list[dict[str, str]]:
    """["lr=1,2", "b=3"] -> [{"lr": "1", "b": "3"}, {"lr": "2", "b": "3"}]; ValueError for what is no FIELD=VALUES."""
    axes = []
    for setting in settings:
        name, _, values = setting.partition("=")
        if not name or not all(values.split(",")):
            raise ValueError(f"--set {setting}: give FIELD=VALUE,VALUE,…")
        axes.append([(name.replace("-", "_"), value) for value in values.split(",")])
    return [dict(point) for point in itertools.product(*axes)]


def is_finished(recipe: Recipe) -> bool:
    """Whether `output_dir` holds the last step of this very recipe; another's is left for the script to refuse."""
    newest, saved = find_checkpoint(Path(recipe.output_dir), "auto"), Path(recipe.output_dir) / "recipe.yaml"
    if newest is None or not saved.is_file() or int(newest.name.removeprefix("step-")) < recipe.max_steps:
        return False
    before = parse_recipe(["--recipe", str(saved)], default=saved)
    return all(getattr(before, name) == getattr(recipe, name) for name in (*DEFINING_FIELDS, "dataset_dir"))


def run(argv: list[str], recipe: Recipe, jobs: int = 1) -> bool:
    """Start or go on with a run, unless it is finished; its output goes to OUTPUT_DIR.log. Whether it is done.

    jobs: how many runs share the cores; OMP_NUM_THREADS, where it is not set, follows.

    Raises:
        KeyboardInterrupt: it was stopped by a signal.
    """
    if is_finished(recipe):
        return True
    log = Path(f"{recipe.output_dir}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    with log.open("ab") as output:
        # Not subprocess.run, which would kill a run that saves its last step after Ctrl-C.
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *argv], stdout=output, stderr=output, env={**threads, **os.environ}
        )
        code = process.wait()
    if code in (STOPPED_BY_SIGNAL, 130):
        raise KeyboardInterrupt
    return code == 0


def summarise(setting: dict[str, str], folders: list[Path]) -> dict[str, Any]:
    """The final validation losses of a setting's finished runs: each, their mean and their standard deviation."""
    curves = [[(row["tokens"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl")
               if row["kind"] == "val" and row["loss"] is not None] for folder in folders]  # fmt: skip
    losses = [curve[-1][1] for curve in curves if curve]
    return {
        "setting": setting,
        "runs": [str(folder) for folder in folders],
        "losses": losses,
        "mean": fmean(losses) if losses else None,
        "std": stdev(losses) if len(losses) > 1 else None,
        "curves": curves,
    }


def table(results: list[dict[str, Any]]) -> str:
    """The settings, best first, as lines of a Markdown table."""
    names = list(results[0]["setting"])
    lines = [[*names, "final validation loss", "standard deviation", "seeds"], ["---"] * (len(names) + 3)]
    for result in sorted(results, key=lambda result: (result["mean"] is None, result["mean"])):
        mean, std = (f"{result[key]:.4f}" if result[key] is not None else "–" for key in ("mean", "std"))
        lines.append([*result["setting"].values(), mean, std, str(len(result["losses"]))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(results: list[dict[str, Any]], png: Path) -> None:
    """Validation loss over tokens: a colour a setting, a thin line a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), dpi=150, layout="constrained")
    panel = figure.subplots()
    for index, result in enumerate(results):
        name = ", ".join(f"{field} {value}" for field, value in result["setting"].items())
        for seed, curve in enumerate(result["curves"]):
            tokens, losses = zip(*curve[1:], strict=True) if len(curve) > 1 else ((), ())  # without step 0
            label = None if seed else name
            panel.plot(tokens, losses, color=f"C{index}", linewidth=1, marker="o", markersize=2, label=label)
    panel.set(xlabel="tokens", ylabel="validation loss, nats per token")
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, fontsize=8)
    figure.savefig(png)


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="the recipe's YAML; every field of it is also a flag")
    parser.add_argument("--set", action="append", required=True, metavar="FIELD=VALUES", help="values by commas")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each setting, from the recipe's seed on")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of all runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    arguments, fields = parser.parse_known_args()
    try:
        if not SCRIPT.is_file():
            raise ValueError(f"there is no {SCRIPT}: a sweep needs a checkout, not the installed package alone")
        base = ["--recipe", arguments.recipe, *fields]
        seed = parse_recipe(base, default=arguments.recipe).seed
        plan = []
        for setting in grid(arguments.set):  # all of it is read before anything starts
            folder = Path(arguments.output) / ",".join(f"{name}={value}" for name, value in setting.items())
            for number in range(seed, seed + arguments.seeds):
                own = {**setting, "seed": str(number), "output_dir": str(folder / f"seed-{number}")}
                argv = base + [word for name, value in own.items() for word in (f"--{name}", value)]
                plan.append((setting, argv, parse_recipe(argv, default=arguments.recipe)))
        if arguments.jobs < 1:
            raise ValueError(f"--jobs {arguments.jobs} must be at least 1")
        for _, _, recipe in plan if arguments.jobs > 1 else []:
            if recipe.source and not all((Path(folder) / "dataset.json").exists() for folder in recipe.dataset_dir):
                raise ValueError(
                    f"{', '.join(recipe.dataset_dir)} is not prepared, and of several runs one alone can prepare it: "
                    "start the recipe once, or prepare it (gpt2repro.data.prepare), before a sweep with --jobs"
                )
    except ValueError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    failed: list[dict[str, str]] = []
    stopped = threading.Event()

    def done(item: tuple[dict[str, str], list[str], Recipe]) -> bool:
        setting, argv, recipe = item
        if setting in failed or stopped.is_set():
            return False
        try:
            ended_well = run(argv, recipe, arguments.jobs)
        except KeyboardInterrupt:
            stopped.set()  # here, since this thread takes the next run before the main one hears of it
            raise
        if not ended_well:
            failed.append(setting)
            log = Path(f"{recipe.output_dir}.log")
            last = (log.read_text(encoding="utf-8", errors="replace").splitlines() or [""])[-1]
            print(f"error: {recipe.output_dir} failed ({last}), see {log}", file=sys.stderr)
            return False
        losses = summarise(setting, [Path(recipe.output_dir)])["losses"]
        print(f"{recipe.output_dir}: {f'{losses[-1]:.4f}' if losses else 'no validation'}", flush=True)
        return True

    with ThreadPoolExecutor(arguments.jobs) as pool:
        finished = [item for item, is_done in zip(plan, pool.map(done, plan), strict=True) if is_done]
    results = [
        summarise(setting, [Path(recipe.output_dir) for other, _, recipe in finished if other == setting])
        for setting, _ in itertools.groupby(plan, key=lambda item: item[0])
    ]
    output = Path(arguments.output)
    (output / "sweep.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(results)}\n\n{output / 'sweep.json'}")
    if find_spec("matplotlib") and any(result["losses"] for result in results):
        draw(results, output / "sweep.png")
        print(output / "sweep.png")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
