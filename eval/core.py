"""CORE: the mean centered accuracy over 22 tasks (DCLM, arXiv 2406.11794), as nanochat computes it.

    python -m eval.core --model openai-community/gpt2 --output core.json
    accelerate launch --num_processes 8 -m eval.core --model runs/gpt2-124m/latest --limit 500
    python -m eval.core --model M --bundle DIR --tasks copa,winograd

Works for every causal language model of the library. The centered accuracy of a task is (accuracy - baseline) /
(1 - baseline), where the baseline is the accuracy of guessing. core.json holds `core`, the accuracy of every task, and
what they were measured with; core.jsonl holds every item. Without --bundle the published bundle is downloaded once. A
figure over fewer tasks or rows than the published ones is marked.
"""

from gpt2repro import command

from . import flags

if command.starting(__name__):
    command.parse_early(lambda: flags.core(__doc__, None))

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from .accuracy import mean_and_error
from .core_tasks import PUBLISHED_ROWS, CoreTask, bundle_folder, encode, read_bundle, read_rows
from .loading import best_device, load_from, max_positions
from .output import check_output, measured, write_results
from .scoring import Sequences, score_items

ROWS_AT_ONCE = 256  # tokenised and scored together: enough to sort by length, few enough for the memory


@dataclass(frozen=True)
class PreparedCore:
    """The rows of CORE's tasks: what a run reads once and scores at every validation."""

    tasks: list[tuple[CoreTask, list[dict[str, Any]]]]
    tokenizer: Any
    limit: int | None

    def figures(self, model, *, rank: int, world_size: int, gather_object: Callable[[list], list]) -> dict:
        """A row for metrics.jsonl: `{"task": "core", "core", "tasks", …}`, the same on every process."""
        tasks = {}
        for task, rows in self.tasks:
            share = score_rows(model, self.tokenizer, task, rows, range(rank, len(rows), world_size))
            tasks[task.label] = task_figures(task, gather_object(list(share)))
        return {**core_figures(tasks), "limit": self.limit}


def prepare_core(spec: str, tokenizer) -> PreparedCore:
    """`core[:LIMIT][=BUNDLE]` as tasks that are ready to score, e.g. `core:500=eval_bundle`.

    Raises:
        ValueError: another option than a number, or what `read_bundle` and `read_rows` refuse.
    """
    name, _, bundle = spec.partition("=")
    limit = name.removeprefix("core").removeprefix(":")
    if limit and not (limit.isdecimal() and int(limit)):
        raise ValueError(f"{spec!r} is no benchmark: CORE is core, core:LIMIT or core:LIMIT=BUNDLE_FOLDER")
    rows = int(limit) if limit else None
    tasks = read_bundle(os.path.expanduser(bundle) or bundle_folder())
    return PreparedCore([(task, read_rows(task, limit=rows)) for task in tasks], tokenizer, rows)


@torch.no_grad()
def score_rows(
    model, tokenizer, task: CoreTask, rows: list[dict[str, Any]], indices: Sequence[int], *,
    batch_size: int | None = None, advance: Callable[[int], object] = int,
) -> Iterator[dict]:
    """A result for each row at `indices`: task, index, correct, and `prediction` (a choice) or `tokens`.

    A row that cannot be scored is wrong and has `"scored": false`. `advance` is told of every group of rows that is
    done. The caller has set `model.eval()`.
    """
    for first in range(0, len(indices), ROWS_AT_ONCE):
        group = indices[first : first + ROWS_AT_ONCE]
        items = encode(task, rows, group, tokenizer, max_length=max_positions(model))
        can_be_scored = [place for place, item in enumerate(items) if item]
        scored = score_items(model, [items[place] for place in can_be_scored], batch_size=batch_size)
        results = {can_be_scored[result["index"]]: result for result in scored}
        for place, (index, item) in enumerate(zip(group, items, strict=True)):
            answer = _answer(task, item, results[place]) if item else {"correct": False, "scored": False}
            yield {"task": task.label, "index": index, **answer}
        advance(len(group))


def _answer(task: CoreTask, item: Sequences, result: dict) -> dict:
    """Whether a row is answered right, and the answer."""
    if task.kind == "language_modeling":
        return {"correct": result["prediction"] == 0, "tokens": result["tokens"], "truncated": item.truncated}
    # A choice that another one begins with has nothing of its own to score. nanochat takes the mean loss over nothing,
    # NaN, which `min` keeps if it comes first and never takes otherwise.
    losses = [-score / n if n else float("nan") for score, n in zip(result["scores"], item.lengths, strict=True)]
    prediction = losses.index(min(losses))
    return {"correct": prediction == item.label, "prediction": prediction, "truncated": item.truncated}


def task_figures(task: CoreTask, results: list[dict]) -> dict:
    """A task's accuracy with its standard error and centered accuracy; how many items were cut or not scored."""
    accuracy, stderr = mean_and_error([result["correct"] for result in results])
    return {
        "accuracy": accuracy, "centered": (accuracy - task.baseline) / (1 - task.baseline), "n": len(results),
        "stderr": stderr, "truncated": sum(result.get("truncated", False) for result in results),
        "not_scored": sum(not result.get("scored", True) for result in results),
    }


def core_figures(tasks: dict[str, dict]) -> dict:
    """`core`, the mean of the centered accuracies, and whether it is over all rows of all published tasks."""
    fewer = [label for label, figures in tasks.items() if figures["n"] < PUBLISHED_ROWS.get(label, 0)]
    missing = [label for label in PUBLISHED_ROWS if label not in tasks]
    core = sum(figures["centered"] for figures in tasks.values()) / len(tasks)
    complete = tasks.keys() == PUBLISHED_ROWS.keys() and not fewer
    return {
        "task": "core", "core": core, "n": sum(figures["n"] for figures in tasks.values()), "complete": complete,
        "missing_tasks": missing, "tasks_with_fewer_rows": fewer, "tasks": tasks,
    }


def core_text(figures: dict) -> str:
    """The figure on a line. What is not over all published tasks and rows is not called CORE."""
    if figures["complete"]:
        return f"CORE {figures['core']:.4f}"
    missing = f" (without {', '.join(figures['missing_tasks'])})" if figures["missing_tasks"] else ""
    fewer = len(figures["tasks_with_fewer_rows"])
    return (
        f"mean centered accuracy {figures['core']:.4f}; not CORE: {len(figures['tasks'])} tasks of "
        f"{len(PUBLISHED_ROWS)}{missing}, {fewer} of them with fewer rows than published"
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    check_output(arguments.output, items=True)
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit is {arguments.limit}: give at least 1, or leave it out for all rows")
    state, began = PartialState(cpu=(arguments.device or best_device()) == "cpu"), time.perf_counter()
    with state.main_process_first():  # it downloads the bundle
        bundle = arguments.bundle or bundle_folder()
    labels = arguments.tasks.split(",") if arguments.tasks else None
    tasks = [(task, read_rows(task, limit=arguments.limit)) for task in read_bundle(bundle, labels=labels)]
    if state.num_processes > 1:
        arguments.device = str(state.device)
    model, tokenizer = load_from(arguments)
    rank, processes, items, figures = state.process_index, state.num_processes, [], {}
    shares = [range(rank, len(rows), processes) for _, rows in tasks]
    bar = tqdm(total=sum(map(len, shares)), unit="row", disable=None if state.is_main_process else True)
    for (task, rows), share in zip(tasks, shares, strict=True):
        bar.set_description(task.label)
        options = {"batch_size": arguments.batch_size, "advance": bar.update}
        results = gather_object(list(score_rows(model, tokenizer, task, rows, share, **options)))
        items += sorted(results, key=lambda result: result["index"])
        figures[task.label] = task_figures(task, results)
        if state.is_main_process:
            tqdm.write(_line(task, figures[task.label]))
    bar.close()
    if not state.is_main_process:
        return
    outcome = core_figures(figures)
    print(f"{core_text(outcome)} ({arguments.dtype})")
    if arguments.output:
        settings = {
            "limit": arguments.limit, "bundle": str(bundle), "dtype": arguments.dtype, "device": str(model.device),
            "seconds": round(time.perf_counter() - began, 1), "versions": {
                "python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        write_results(arguments.output, {**outcome, **measured(model, arguments.model), **settings}, items=items)


def _line(task: CoreTask, figures: dict) -> str:
    """A task's line on the terminal."""
    return (
        f"{task.label:32} accuracy {figures['accuracy']:.4f}  centered {figures['centered']:+.4f}  "
        f"{figures['n']:,} items, {figures['truncated']} truncated, {figures['not_scored']} not scored"
    )


def main(argv: list[str] | None = None) -> int:
    arguments = flags.core(__doc__, argv)
    return command.run(lambda: _evaluate(arguments))


if __name__ == "__main__":
    sys.exit(main())
