"""How fast HellaSwag is scored: our scorer, one item at a time, and lm-eval at its best batch size.

    python -m benchmarks.eval_throughput --data hellaswag.jsonl --tokenizer gpt2 [--items 48] [--json F]
    python -m benchmarks.eval_throughput --data hellaswag.jsonl --tokenizer gpt2 --device cuda --items 10042 --tf32

Weights are random at the shape of GPT-2 124M: speed does not depend on their values. All ways score the same items
from their texts on, tokenising included, and take turns in one process; the median of the rounds counts. Processor
time is given too: on a machine with other work it is the steadier figure (with OMP_NUM_THREADS=1, else waiting counts
as well). Ours is measured in the style of the rival: `completion` beside one item at a time (what the original does),
`harness` beside lm-eval.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from benchmarks.training_step import machine
from configuration_gpt2repro import NAMED_SHAPES, GPT2ReproConfig
from eval.loading import run_command, write_json
from eval.multiple_choice import encode, score_items, score_task
from eval.tasks import Row, read_rows, render
from modeling_gpt2repro import GPT2ReproForCausalLM


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


def lm_eval_scorer(model, tokenizer, rows: list[Row], batch_size: int) -> Callable[[], list[int]]:
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


def own_scorer(
    model, tokenizer, rows: list[Row], style: str, batch_size: int | None, **options
) -> Callable[[], list[int]]:
    def score() -> list[int]:
        options_ = {"items": rows, "style": style, "batch_size": batch_size, **options}
        results = score_task(model, tokenizer, "hellaswag", **options_)
        return [result["prediction_norm"] for result in sorted(results, key=lambda result: result["index"])]

    return score


def repeated_scorer(model, tokenizer, rows: list[Row], batch_size: int | None) -> Callable[[], list[int]]:
    """What a training loop does every N steps: the items were tokenised once, before."""
    items = [render(row, "hellaswag", "completion") for row in rows]
    encoded = encode(items, tokenizer, max_length=model.config.n_positions)

    def score() -> list[int]:
        results = score_items(model, encoded, batch_size=batch_size)
        return [result["prediction_norm"] for result in sorted(results, key=lambda result: result["index"])]

    return score


def measure(ways: dict[str, Callable[[], list[int]]], *, rounds: int, device: torch.device) -> tuple[dict, dict]:
    """Median seconds of every way (clock, processor), taking turns after a warm-up; and its predictions."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    predictions = {}
    for turn in range(rounds + 1):
        for name, score in ways.items():
            clock, processor = time.perf_counter(), time.process_time()
            predictions[name] = score()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn > 0:
                seconds[name].append((time.perf_counter() - clock, time.process_time() - processor))
    medians = {name: tuple(map(median, zip(*values, strict=True))) for name, values in seconds.items()}
    return medians, predictions


def take_items(path: str, count: int) -> list[Row]:
    """`count` items spread over the file, the whole file again where it has fewer."""
    rows = read_rows("hellaswag", data=path)
    if count <= len(rows):
        return [rows[index * len(rows) // count] for index in range(count)]
    return [rows[index % len(rows)] for index in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="HellaSwag items as JSONL")
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id of GPT-2's tokenizer")
    parser.add_argument("--model", default="gpt2", choices=list(NAMED_SHAPES), help="shape of the random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tf32", action="store_true", help="TensorFloat32 matmuls on a GPU")
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, help="ours, in items (default: as many as fill a forward)")
    parser.add_argument("--lm-eval-batch-sizes", type=int, nargs="*", default=[1, 4, 16, 64], help="in choices")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    if arguments.tf32:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    shape = NAMED_SHAPES[arguments.model]
    device = torch.device(arguments.device)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape)).to(device, getattr(torch, arguments.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    rows = take_items(arguments.data, arguments.items)
    batch_size = arguments.batch_size
    ways = {
        "ours, completion": own_scorer(model, tokenizer, rows, "completion", batch_size),
        "ours, completion, tokenised before": repeated_scorer(model, tokenizer, rows, batch_size),
        "ours, completion, context not shared": own_scorer(
            model, tokenizer, rows, "completion", batch_size, share_prefix=False
        ),
        "one item at a time": lambda: one_item_at_a_time(model, tokenizer, rows),
        "ours, harness": own_scorer(model, tokenizer, rows, "harness", batch_size),
        **{
            f"lm-eval, batch size {size}": lm_eval_scorer(model, tokenizer, rows, size)
            for size in arguments.lm_eval_batch_sizes
        },
    }
    seconds, predictions = measure(ways, rounds=arguments.rounds, device=device)
    report(seconds, predictions, rows, arguments)


def report(seconds: dict, predictions: dict, rows: list[Row], arguments: argparse.Namespace) -> None:
    print(f"{'way':38} {'seconds':>9} {'items/s':>9} {'processor s':>12}")
    for name, (clock, processor) in seconds.items():
        print(f"{name:38} {clock:9.3f} {len(rows) / clock:9.2f} {processor:12.3f}")
    rivals = {"one item at a time": "completion"}
    lm_eval = [name for name in seconds if name.startswith("lm-eval")]
    if lm_eval:
        rivals[min(lm_eval, key=lambda name: seconds[name][0])] = "harness"
    ratios = {}
    for name, style in rivals.items():
        own = f"ours, {style}"
        clock, processor = (theirs / mine for theirs, mine in zip(seconds[name], seconds[own], strict=True))
        ratios[name] = {"clock": clock, "processor": processor}
        same = sum(a == b for a, b in zip(predictions[name], predictions[own], strict=True))
        print(
            f"{clock:.2f} times as fast as {name} ({processor:.2f} in processor time); "
            f"{same} of {len(rows)} predictions (acc_norm) are equal"
        )
    settings = {key: value for key, value in vars(arguments).items() if key not in ("data", "tokenizer", "json")}
    figures = {"seconds": seconds, "ratios": ratios, "settings": settings,
               "machine": machine(torch.device(arguments.device))}  # fmt: skip
    print(json.dumps(figures))
    if arguments.json:
        write_json(arguments.json, figures)


if __name__ == "__main__":
    run_command(main)
