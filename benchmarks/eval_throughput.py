"""How fast HellaSwag is scored: our scorer, one item at a time, and lm-eval at its best batch size.

    python -m benchmarks.eval_throughput --data hellaswag.jsonl --tokenizer gpt2 [--items 48] [--json F]
    python -m benchmarks.eval_throughput --data hellaswag.jsonl --tokenizer gpt2 --device cuda --items 10042 --tf32

Weights are random at the shape of GPT-2 124M: speed does not depend on their values. All ways score the same items
from their texts on, tokenising included, and take turns in one process; the median of the rounds counts. Processor
time is given too: on a machine with other work it is the steadier figure (with OMP_NUM_THREADS=1, else waiting counts
as well). Ours is measured in the style of the rival: `completion` beside one item at a time (what the original does),
`harness` beside lm-eval.
"""

from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from benchmarks.measuring import Seconds, command_line, finish, machine, print_row, time_in_turns
from configuration_gpt2repro import NAMED_SHAPES, GPT2ReproConfig
from eval.loading import run_command
from eval.multiple_choice import encode, score_items, score_task
from eval.tasks import Row, read_rows, render
from modeling_gpt2repro import GPT2ReproForCausalLM

Scorer = Callable[[], list[int]]  # the predictions (acc_norm) of all items


@torch.no_grad()
def one_item_at_a_time(model, tokenizer, rows: list[Row]) -> list[int]:
    """The four endings of an item as one padded batch of four, logits and losses at every position."""
    predictions = []
    for row in rows:
        context = tokenizer(row.fields["ctx"])["input_ids"]
        endings = [tokenizer(" " + ending)["input_ids"] for ending in row.fields["endings"]]
        longest = len(context) + max(map(len, endings))
        tokens, mask = torch.zeros(4, longest, dtype=torch.long), torch.zeros(4, longest)
        for index, ending in enumerate(endings):
            tokens[index, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[index, len(context) : len(context) + len(ending)] = 1
        tokens, mask = tokens.to(model.device), mask[:, 1:].to(model.device)
        logits = model(tokens).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view_as(mask)
        predictions.append(int(((losses * mask).sum(1) / mask.sum(1)).argmin()))
    return predictions


def lm_eval_scorer(model, tokenizer, rows: list[Row], batch_size: int) -> Scorer:
    """lm-eval's `hf` model on the requests that its own task would make of the rows."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
    items = [render(row, "hellaswag", "harness") for row in rows]

    def score() -> list[int]:
        pairs = [pair for item in items for pair in zip(item.contexts, item.continuations, strict=True)]
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        scores = torch.tensor([score for score, _ in model.loglikelihood(requests, disable_tqdm=True)])
        lengths = torch.tensor([item.lengths for item in items])
        return (scores.view(-1, 4) / lengths).argmax(1).tolist()

    return score


def predictions(results: list[dict]) -> list[int]:
    return [result["prediction_norm"] for result in sorted(results, key=lambda result: result["index"])]


def all_ways(model, tokenizer, rows: list[Row], lm_eval_batch_sizes: list[int]) -> dict[str, Scorer]:
    def ours(style: str, **options) -> Scorer:
        return lambda: predictions(score_task(model, tokenizer, "hellaswag", items=rows, style=style, **options))

    # What a training loop does every N steps: the items were tokenised once, before.
    items = [render(row, "hellaswag", "completion") for row in rows]
    encoded = encode(items, tokenizer, max_length=model.config.n_positions)
    ways = {
        "ours, completion": ours("completion"),
        "ours, completion, tokenised before": lambda: predictions(score_items(model, encoded)),
        "ours, completion, context not shared": ours("completion", share_prefix=False),
        "one item at a time": partial(one_item_at_a_time, model, tokenizer, rows),
        "ours, harness": ours("harness"),
    }
    for size in lm_eval_batch_sizes:
        ways[f"lm-eval, batch size {size}"] = lm_eval_scorer(model, tokenizer, rows, size)
    return ways


def compare(seconds: dict[str, Seconds], predicted: dict[str, list[int]]) -> dict[str, dict[str, float]]:
    """How many times as fast ours is, in the rival's style, as one item at a time and as lm-eval at its best."""
    rivals = {"one item at a time": "ours, completion"}
    lm_eval = [name for name in seconds if name.startswith("lm-eval")]
    if lm_eval:
        rivals[min(lm_eval, key=lambda name: seconds[name].clock)] = "ours, harness"
    ratios = {}
    print_row("ours is faster than", "times", "by processor", "predicts the same")
    for name, own in rivals.items():
        ratios[name] = {what: getattr(seconds[name], what) / getattr(seconds[own], what) for what in Seconds._fields}
        same = sum(a == b for a, b in zip(predicted[name], predicted[own], strict=True))
        print_row(name, *(f"{ratio:.2f}" for ratio in ratios[name].values()), f"{same} of {len(predicted[own])}")
    return ratios


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--data", required=True, help="HellaSwag items as JSONL")
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id of GPT-2's tokenizer")
    parser.add_argument("--model", default="gpt2", choices=list(NAMED_SHAPES), help="shape of the random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tf32", action="store_true", help="TensorFloat32 matmuls on a GPU")
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lm-eval-batch-sizes", type=int, nargs="*", default=[1, 4, 16, 64], help="in choices")
    arguments = parser.parse_args()
    if arguments.tf32:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**NAMED_SHAPES[arguments.model])).eval()
    model.to(arguments.device, getattr(torch, arguments.dtype))
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    found, count = read_rows("hellaswag", data=arguments.data), arguments.items
    rows = [found[index * len(found) // count] for index in range(count)]  # spread over the file, or over and over
    ways = all_ways(model, tokenizer, rows, arguments.lm_eval_batch_sizes)
    timings, predicted = time_in_turns(ways, rounds=arguments.rounds, warmup=1)
    seconds = {name: Seconds(*map(median, zip(*values, strict=True))) for name, values in timings.items()}
    print_row("way", "seconds", "items/s", "processor s")
    for name, (clock, processor) in seconds.items():
        print_row(name, f"{clock:.3f}", f"{len(rows) / clock:.2f}", f"{processor:.3f}")
    ratios = compare(seconds, predicted)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("data", "tokenizer", "json")}
    finish({"seconds": seconds, "ratios": ratios, "settings": settings, "machine": machine(arguments.device)},
           arguments.json)  # fmt: skip


if __name__ == "__main__":
    run_command(main)
