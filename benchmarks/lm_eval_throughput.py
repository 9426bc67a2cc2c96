"""Throughput of log-likelihoods: our scorer as a model of lm-eval against lm-eval's `hf` model.

    python -m benchmarks.lm_eval_throughput --task hellaswag --data hellaswag.jsonl --tokenizer gpt2 [--json F]
    python -m benchmarks.lm_eval_throughput --task arc_easy --data arc_easy.jsonl --tokenizer gpt2 --shots 10 --items 4

Weights are random at the shape of GPT-2 124M: speed does not depend on their values. Every way answers the same
requests, tokenisation included; the ways take turns in one process, and the median of the rounds counts. With --shots
every item has examples of its own, as lm-eval draws them. Set OMP_NUM_THREADS=1 on a machine with other work, or
waiting threads count as processor time.
"""

import argparse
import sys
from functools import partial

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from benchmarks.measuring import compare, finish, model_parser, print_row, time_in_turns
from configuration_gpt2repro import NAMED_SHAPES, GPT2ReproConfig
from gpt2repro import command
from gpt2repro.eval.lm_eval_model import FastLM
from gpt2repro.eval.tasks import TASKS, read_rows, render
from modeling_gpt2repro import GPT2ReproForCausalLM


def requests_of(arguments: argparse.Namespace) -> list[Instance]:
    """The requests of items that are spread over the file, each with the answered items after it as examples."""
    items = [render(row, arguments.task, "harness") for row in read_rows(arguments.task, data=arguments.data)]
    answered = [f"{item.contexts[item.label]}{item.continuations[item.label]}\n\n" for item in items]
    requests = []
    for index in range(arguments.items):
        place = index * len(items) // arguments.items
        examples = "".join((answered * 2)[place + 1 : place + 1 + arguments.shots])
        for context, choice in zip(items[place].contexts, items[place].continuations, strict=True):
            requests.append(Instance("loglikelihood", {}, (examples + context, choice), len(requests)))
    return requests


def measure(arguments: argparse.Namespace) -> dict:
    """Items a second of every way, and how many times as fast ours is."""
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**NAMED_SHAPES[arguments.model_shape])).eval()
    model.to(arguments.device, getattr(torch, arguments.dtype))
    loaded = {"pretrained": model, "tokenizer": AutoTokenizer.from_pretrained(arguments.tokenizer)}
    models = {"ours": FastLM(**loaded)}
    for size in arguments.lm_eval_batch_sizes:
        models[f"lm-eval, batch size {size}"] = HFLM(**loaded, batch_size=size)
    requests = requests_of(arguments)
    ways = {name: partial(own.loglikelihood, requests, disable_tqdm=True) for name, own in models.items()}
    timings = time_in_turns(ways, rounds=arguments.rounds, warmup=1)
    figures = compare(timings, amount=arguments.items, unit="items")
    (ours, own_greedy), (theirs, greedy) = (zip(*ways[name](), strict=True) for name in ("ours", [*ways][-1]))
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    same = sum(a == b for a, b in zip(own_greedy, greedy, strict=True))
    print_row(f"largest difference {apart:.1e}; {same} of {len(requests)} greedy flags are the same")
    return {"benchmark": "lm_eval_throughput", "largest_difference": apart, "same_greedy": same, **figures}


def main(argv: list[str] | None = None) -> int:
    parser = model_parser(__doc__, rounds=3)
    parser.add_argument("--task", default="hellaswag", choices=TASKS, metavar="T", help=", ".join(TASKS))
    parser.add_argument("--data", required=True, help="the task's items as JSONL")
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id of GPT-2's tokenizer")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument("--shots", type=int, default=0, help="examples before every item (default: none)")
    parser.add_argument("--lm-eval-batch-sizes", type=int, nargs="*", default=[1, 4, 16, 64], help="in choices")
    arguments = parser.parse_args(argv)
    return command.run(lambda: finish(arguments, measure(arguments)))


if __name__ == "__main__":
    sys.exit(main())
