"""Multiple-choice benchmarks: accuracy of the continuation with the highest log-probability, on ten tasks.

    python -m eval.multiple_choice --task piqa --model runs/demo/latest --data piqa.jsonl --output piqa.json
    accelerate launch --num_processes 8 -m eval.multiple_choice --task winogrande --model openai-community/gpt2

writes acc, acc_norm and their standard errors to piqa.json, and every item's scores to piqa.jsonl. A training loop
prepares its tasks once and scores them as often as it likes, every process a share:

    tasks = [prepare_task("hellaswag:completion:1000", tokenizer, max_length=model.config.n_positions)]
    rows = evaluate_tasks(model, tasks, rank=rank, world_size=world_size, gather_object=gather_object)
"""

from gpt2repro import command

from . import flags

if command.starting(__name__):
    command.parse_early(lambda: flags.multiple_choice(__doc__, None))

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from accelerate import PartialState
from accelerate.utils import gather_object

from gpt2repro.run.metrics import row_text

from .accuracy import summarise
from .core import PreparedCore, prepare_core
from .loading import best_device, check_vocabulary, load_from, max_positions
from .output import check_output, measured, write_results
from .scoring import Sequences, encode, score_items
from .tasks import TASKS, Row, read_rows, render, task_style


@dataclass(frozen=True)
class PreparedTask:
    """A task read, rendered and tokenised: what is done once for many evaluations."""

    task: str
    style: str
    items: list[Sequences]

    def figures(self, model, *, rank: int, world_size: int, gather_object: Callable[[list], list]) -> dict:
        """The task's row of figures, the same on every process."""
        results = gather_object(score_items(model, self.items, rank=rank, world_size=world_size))
        return _figures(self.task, self.style, results)


def prepare_task(spec: str, tokenizer, *, max_length: int) -> PreparedTask | PreparedCore:
    """`TASK[:STYLE][:LIMIT][=FILE]` as a task that is ready to score, e.g. `hellaswag:harness:500=hellaswag.jsonl`.

    `core[:LIMIT][=BUNDLE]` is CORE.

    Raises:
        ValueError: an unknown task or style, or what `read_rows`, `render` and `encode` refuse.
    """
    name, _, data = spec.partition("=")
    task, *options = name.split(":")
    if task == "core":
        return prepare_core(spec, tokenizer)
    limit, style = None, None
    for option in options:
        if option.isdigit():
            limit = int(option)
        else:
            style = option
    style = task_style(task, style)
    rows = read_rows(task, data=os.path.expanduser(data) or None, limit=limit)
    items = encode([render(row, task, style) for row in rows], tokenizer, max_length=max_length)
    return PreparedTask(task, style, items)


def score_task(
    model, tokenizer, task: str, *, items: Sequence[Row], style: str | None = None, **options
) -> list[dict]:
    """Per-item results of one task on `items` (rows as `read_rows` returns them); `options` are `score_items`'s.

    Raises:
        ValueError: rows that cannot be scored, or a tokenizer that is not the model's.
    """
    check_vocabulary(model, tokenizer)
    encoded = encode([render(row, task, style) for row in items], tokenizer, max_length=max_positions(model))
    return score_items(model, encoded, **options)


def evaluate_tasks(
    model, tasks: Sequence[PreparedTask | PreparedCore], *, rank: int = 0, world_size: int = 1,
    gather_object: Callable[[list], list] | None = None,
) -> list[dict]:
    """One row of figures per task, the same on every process: `{"task", "style", "acc", "acc_norm", "n", …}`.

    `gather_object` joins lists of all processes (as in accelerate.utils). Runs eagerly on the weights of a compiled
    model, in the precision of the caller's autocast, and restores the model's training mode.

    Raises:
        ValueError: several processes and no `gather_object`: the figures would be those of one share.
    """
    if world_size > 1 and gather_object is None:
        raise ValueError(f"world_size is {world_size}: give a gather_object that joins the processes' results")
    was_training = model.training
    model.eval()
    share = {"rank": rank, "world_size": world_size, "gather_object": gather_object or list}
    rows = [task.figures(model, **share) for task in tasks]
    model.train(was_training)
    return rows


def _figures(task: str, style: str, results: list[dict]) -> dict:
    return {"task": task, "style": style, **summarise(results), "dataset": TASKS[task].dataset}


def run_task(arguments: argparse.Namespace, task: str) -> dict | None:
    """Score one task as the command line says; under `accelerate launch` every process takes a share.

    Returns the figures, on the main process.
    """
    check_output(arguments.output, items=True)
    style = task_style(task, arguments.style)
    rows = read_rows(task, data=arguments.data, limit=arguments.limit)
    state = PartialState(cpu=(arguments.device or best_device()) == "cpu")
    if state.num_processes > 1:
        arguments.device = str(state.device)
    model, tokenizer = load_from(arguments)
    share = score_task(
        model, tokenizer, task, items=rows, style=style, batch_size=arguments.batch_size, progress=True,
        rank=state.process_index, world_size=state.num_processes,
    )
    results = sorted(gather_object(share), key=lambda result: result["index"])
    if not state.is_main_process:
        return None
    figures = _figures(task, style, results)
    print(*row_text("eval", figures))
    if arguments.output:
        settings = {**measured(model, arguments.model), "data": arguments.data, "dtype": arguments.dtype}
        write_results(arguments.output, {**figures, **settings}, items=results)
    return figures


def benchmark_command(arguments: argparse.Namespace, task: str) -> int:
    """`run_task` as a command; returns the exit code."""

    def work() -> None:
        run_task(arguments, task)

    return command.run(work)


def main(argv: list[str] | None = None) -> int:
    arguments = flags.multiple_choice(__doc__, argv)
    return benchmark_command(arguments, arguments.task)


if __name__ == "__main__":
    sys.exit(main())
