"""CORE against nanochat's own code: the same verdict on every item, and the time of each.

    python -m benchmarks.core_parity --reference nanochat/nanochat/core_eval.py --model M --bundle DIR --limit 100

The two score the same rows in turn, GROUP rows at a time, in one process. Where nanochat's code stops at an assertion,
the item has to count as wrong here. The last line weights the seconds a row of each task by the published number of
rows. Exit code 1 if a verdict differs.
"""

import argparse
import sys
import time
from types import ModuleType

import torch

from gpt2repro import command
from gpt2repro.eval.core import score_rows
from gpt2repro.eval.core_tasks import PUBLISHED_ROWS, CoreTask, read_bundle, read_rows
from gpt2repro.eval.flags import model_parser
from gpt2repro.eval.loading import load_from, max_positions, start_token

from .measuring import finish, load_file

GROUP = 50


class ForNanochat:
    """A model and a tokenizer of the library in the form that nanochat's code calls."""

    def __init__(self, model, tokenizer) -> None:
        self.model, self.tokenizer, self.max_seq_len = model, tokenizer, max_positions(model)

    def get_bos_token_id(self) -> int:
        return start_token(self.tokenizer)

    def __call__(self, given, prepend: int | None = None):
        if isinstance(given, torch.Tensor):  # (B, T) token ids -> (B, T, V) logits
            return self.model(given, use_cache=False).logits
        return [[prepend, *ids] for ids in self.tokenizer(given, add_special_tokens=False, verbose=False)["input_ids"]]


def reference_verdict(reference: ModuleType, both: ForNanochat, task: CoreTask, rows: list, index: int) -> bool | None:
    """nanochat's verdict on a row; None where its code stops at an assertion."""
    settings = {"task_type": task.kind, "num_fewshot": task.shots, "continuation_delimiter": task.delimiter}
    try:
        return bool(reference.evaluate_example(index, both, both, rows, both.model.device, settings))
    except AssertionError:
        return None


def compare_task(reference: ModuleType, model, tokenizer, task: CoreTask, rows: list) -> dict:
    """Rows with another verdict, rows on which nanochat's code asserts, and the seconds of each way."""
    both, seconds = ForNanochat(model, tokenizer), {"ours": 0.0, "nanochat": 0.0}
    differ, asserted, right = [], [], 0
    for first in range(0, len(rows), GROUP):
        group = range(first, min(first + GROUP, len(rows)))
        began = time.perf_counter()
        ours = [result["correct"] for result in score_rows(model, tokenizer, task, rows, group)]
        middle = time.perf_counter()
        theirs = [reference_verdict(reference, both, task, rows, index) for index in group]
        seconds["ours"] += middle - began
        seconds["nanochat"] += time.perf_counter() - middle
        differ += [index for index, a, b in zip(group, ours, theirs, strict=True) if a != bool(b)]
        asserted += [index for index, verdict in zip(group, theirs, strict=True) if verdict is None]
        right += sum(ours)
    return {"n": len(rows), "right": right, "differ": differ, "asserted": asserted, **seconds}


def weighted_ratio(tasks: dict[str, dict]) -> float:
    """nanochat's seconds over ours, for all published rows of the tasks that were measured."""

    def seconds(way: str) -> float:
        return sum(row[way] / row["n"] * PUBLISHED_ROWS[label] for label, row in tasks.items())

    return seconds("nanochat") / seconds("ours")


def _measure(arguments: argparse.Namespace) -> int:
    reference, found = load_file(arguments.reference, "nanochat's nanochat/core_eval.py"), {}
    labels = arguments.tasks.split(",") if arguments.tasks else None
    model, tokenizer = load_from(arguments)
    arguments.device = str(model.device)
    for task in read_bundle(arguments.bundle, labels=labels):
        row = found[task.label] = compare_task(
            reference, model, tokenizer, task, read_rows(task, limit=arguments.limit)
        )
        print(
            f"{task.label:32} {row['n']:5} items  {row['right']:4} right  {len(row['differ'])} differ  "
            f"{len(row['asserted'])} asserted  ours {row['ours']:7.1f} s  nanochat {row['nanochat']:7.1f} s  "
            f"ratio {row['nanochat'] / row['ours']:.2f}", flush=True,
        )
    differ = sum(len(row["differ"]) for row in found.values())
    print(f"{sum(row['n'] for row in found.values()):,} items, {differ} verdicts differ")
    print(f"weighted by the published rows: {weighted_ratio(found):.2f} times nanochat's speed")
    finish(arguments, {"tasks": found})
    return command.EXPLAINED if differ else command.DONE


def main(argv: list[str] | None = None) -> int:
    parser = model_parser(__doc__)
    parser.add_argument("--reference", required=True, help="nanochat's nanochat/core_eval.py")
    parser.add_argument("--bundle", required=True, help="folder of the bundle")
    parser.add_argument("--tasks", help="labels of the bundle's tasks, separated by commas (default: all)")
    parser.add_argument("--limit", type=int, help="rows of every task (default: all)")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args(argv)
    return command.run(lambda: _measure(arguments))


if __name__ == "__main__":
    sys.exit(main())
