"""HellaSwag scoring throughput: our scorer and one item at a time; lm_eval_throughput.py compares it with lm-eval.

    python -m benchmarks.eval_throughput --data hellaswag.jsonl --tokenizer gpt2 [--items 48] [--json F]
    python -m benchmarks.eval_throughput --data hellaswag.jsonl --tokenizer gpt2 --dtype bfloat16 --items 10042

Weights are random at the shape of GPT-2 124M: speed does not depend on their values. Every way scores the same items,
tokenisation included; the ways take turns in one process, and the median of the rounds counts. The style is
`completion`, and the rival scores one item at a time, as build-nanogpt does. Set OMP_NUM_THREADS=1 on a machine with
other work, or waiting threads count as processor time.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from benchmarks.measuring import compare, finish, model_parser, print_row, time_in_turns
from configuration_gpt2repro import NAMED_SHAPES, GPT2ReproConfig
from gpt2repro import command
from gpt2repro.eval.multiple_choice import score_task
from gpt2repro.eval.tasks import Row, read_rows
from modeling_gpt2repro import GPT2ReproForCausalLM

Scorer = Callable[[], list[int]]  # returns the predictions (acc_norm) of all items


def our_scorer(model, tokenizer, rows: list[Row], **options) -> Scorer:
    def score() -> list[int]:
        results = score_task(model, tokenizer, "hellaswag", items=rows, **options)
        return [result["prediction_norm"] for result in sorted(results, key=lambda result: result["index"])]

    return score


@torch.no_grad()
def one_item_at_a_time(model, tokenizer, rows: list[Row]) -> list[int]:
    """The four endings of an item as one padded batch of four, logits and losses at every position."""
    predictions = []
    for row in rows:
        context = row.fields["ctx"]
        texts = [f"{context} {ending}" for ending in row.fields["endings"]]
        batch = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
        tokens, mask = batch["input_ids"], batch["attention_mask"][:, 1:]
        mask[:, : len(tokenizer(context)["input_ids"]) - 1] = 0  # the endings alone count
        logits = model(tokens).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view_as(mask)
        predictions.append(int(((losses * mask).sum(1) / mask.sum(1)).argmin()))
    return predictions


def measure(arguments: argparse.Namespace) -> dict:
    """Items a second of every way, and how many times as fast ours is."""
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**NAMED_SHAPES[arguments.model_shape])).eval()
    model.to(arguments.device, getattr(torch, arguments.dtype))
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer, padding_side="right")
    tokenizer.pad_token = tokenizer.eos_token
    file, count = read_rows("hellaswag", data=arguments.data), arguments.items
    rows = [file[index * len(file) // count] for index in range(count)]  # spread over the file
    own = partial(our_scorer, model, tokenizer, rows)
    ways = {
        "ours": own(style="completion"),
        "ours, context not shared": own(style="completion", share_prefix=False),
        "one item at a time": partial(one_item_at_a_time, model, tokenizer, rows),
    }
    figures = compare(time_in_turns(ways, rounds=arguments.rounds, warmup=1), amount=count, unit="items")
    same = sum(a == b for a, b in zip(ways["ours"](), ways["one item at a time"](), strict=True))
    print_row("ours / one item at a time", f"{same} of {count} predictions are the same")
    return {"benchmark": "eval_throughput", **figures}


def main(argv: list[str] | None = None) -> int:
    parser = model_parser(__doc__, rounds=3)
    parser.add_argument("--data", required=True, help="HellaSwag items as JSONL")
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id of GPT-2's tokenizer")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--items", type=int, default=48)
    arguments = parser.parse_args(argv)
    return command.run(lambda: finish(arguments, measure(arguments)))


if __name__ == "__main__":
    sys.exit(main())
