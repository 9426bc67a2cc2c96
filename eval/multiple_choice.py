"""Multiple-choice benchmarks: which continuation a model finds likeliest, for all items, tasks and architectures.

    python -m eval.multiple_choice --task piqa --model runs/demo/latest --data piqa.jsonl --output piqa.json
    accelerate launch --num_processes 8 -m eval.multiple_choice --task winogrande --model openai-community/gpt2

writes acc, acc_norm and their standard errors to piqa.json, and every item's scores to piqa.jsonl. A training loop
prepares its tasks once and scores them as often as it likes, every process a share:

    tasks = [prepare_task("hellaswag:completion:1000", tokenizer)]
    rows = evaluate_tasks(model, tasks, rank=rank, world_size=world_size, gather_object=gather_object)

An item is one row of the batch: the context once, then all its continuations side by side, each of which sees the
context and itself (a tree, in the attention mask and the positions). That does the work of the context once instead of
once per choice, and the head is applied only where a continuation's token is predicted.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .loading import check_vocabulary, load_from, max_positions, model_parser, output_file, run_command, write_json
from .tasks import TASKS, Item, Row, read_rows, render, task_style

# The architectures whose trees were compared with one row per choice. Others (ALiBi, state spaces, sliding windows)
# may read positions from the mask's shape: they get one row per choice, and their own head.
TREE_MODELS = ("gpt2", "gpt2repro")
# Tokens of a forward, where the caller names no number of items: what is left of the matmuls' speed when they outgrow
# the caches of a processor was half of it; a GPU wants them large.
BATCH_TOKENS = {"cpu": 384, "cuda": 16_384}
HEAD_ROWS = 2048  # positions that go through the head at once: 2048 * 50257 * 4 bytes = 0.4 GB of logits
FILLER = -1  # the branch of padding


@dataclass(frozen=True)
class Sequences:
    """An item in tokens: the input of every choice, and the tokens at its end that are scored."""

    inputs: list[list[int]]  # context + continuation without its last token
    targets: list[list[int]]  # the continuation
    lengths: list[float]
    label: int
    truncated: bool


@dataclass(frozen=True)
class PreparedTask:
    """A task read, rendered and tokenised: what is done once for many evaluations."""

    task: str
    style: str
    items: list[Sequences]


def prepare_task(spec: str, tokenizer, *, max_length: int) -> PreparedTask:
    """`TASK[:STYLE][:LIMIT][=FILE]` as a task that is ready to score, e.g. `hellaswag:harness:500=hellaswag.jsonl`.

    Raises:
        ValueError: an unknown task or style, or what `read_rows`, `render` and `encode` refuse.
    """
    name, _, data = spec.partition("=")
    task, *options = name.split(":")
    limit, style = None, None
    for option in options:
        if option.isdigit():
            limit = int(option)
        else:
            style = option
    style = task_style(task, style)
    rows = read_rows(task, data=data or None, limit=limit)
    items = encode([render(row, task, style) for row in rows], tokenizer, max_length=max_length)
    return PreparedTask(task, style, items)


def encode(items: Sequence[Item], tokenizer, *, max_length: int) -> list[Sequences]:
    """Tokens of every item, the context cut from the left where it does not fit `max_length` input tokens.

    Context and continuation are tokenised together, then cut where the context's own tokens end: spaces at the end of
    the context belong to the continuation. An empty context is the end-of-text token.

    Raises:
        ValueError: a continuation of no tokens, or of more than `max_length`; with the line of the file.
    """
    texts = [pair for item in items for pair in _texts(item)]
    unique = list(dict.fromkeys(text for pair in texts for text in pair))
    special = not any(item.apart for item in items)  # a beginning of sequence belongs before a whole text only
    ids = dict(zip(unique, tokenizer(unique, add_special_tokens=special, verbose=False)["input_ids"], strict=True))
    return [_sequences(item, ids, start_id=tokenizer.eos_token_id, max_length=max_length) for item in items]


def _sequences(item: Item, ids: dict[str, list[int]], *, start_id: int, max_length: int) -> Sequences:
    inputs, targets, truncated = [], [], False
    for (context_text, text), continuation in zip(_texts(item), item.continuations, strict=True):
        context = ids[context_text]
        target = ids[text] if item.apart else ids[text][len(context) :]
        if not 1 <= len(target) <= max_length:
            raise ValueError(
                f"{item.where}: the continuation {continuation[:40]!r} has {len(target)} tokens of its own, expected "
                f"1 to {max_length}, what the model takes"
            )
        whole = [*(context or [start_id]), *target]
        truncated |= len(whole) > max_length + 1
        inputs.append(whole[-(max_length + 1) : -1])
        targets.append(target)
    lengths = item.lengths or [len(target) for target in targets]
    return Sequences(inputs, targets, [float(length) for length in lengths], item.label, truncated)


def _texts(item: Item) -> Iterator[tuple[str, str]]:
    """For every choice the context, and the text whose tokens hold the continuation."""
    for context, continuation in zip(item.contexts, item.continuations, strict=True):
        yield (context, continuation) if item.apart else (context.rstrip(), context + continuation)


@dataclass(frozen=True)
class Tree:
    """One row of a batch: a shared beginning and its branches, and where in it the scored tokens are predicted."""

    tokens: list[int]
    positions: list[int]
    branches: list[int]  # 0 for the shared beginning, 1 … for the choices
    predicted_at: list[int]  # columns of the row
    targets: list[int]

    @classmethod
    def grow(cls, inputs: list[list[int]], targets: list[list[int]]) -> "Tree":
        shared = len(os.path.commonprefix(inputs)) if len(inputs) > 1 else len(inputs[0])  # noqa: RUF071 (any sequence)
        tokens, positions, branches = inputs[0][:shared], list(range(shared)), [0] * shared
        predicted_at = []
        for branch, (own, target) in enumerate(zip(inputs, targets, strict=True), start=1):
            shift = len(tokens) - shared  # a token at place p of the choice stands in column p + shift, if not shared
            places = range(len(own) - len(target), len(own))
            predicted_at += [place if place < shared else place + shift for place in places]
            tokens = tokens + own[shared:]
            positions += range(shared, len(own))
            branches += [branch] * (len(own) - shared)
        return cls(tokens, positions, branches, predicted_at, [token for target in targets for token in target])


def grow_trees(item: Sequences, *, share: bool, max_length: int) -> list[Tree]:
    """One row for all choices of an item, or one for each where they may not share or would be too long together."""
    if share:
        tree = Tree.grow(item.inputs, item.targets)
        if len(tree.tokens) <= max_length:
            return [tree]
    return [Tree.grow([own], [target]) for own, target in zip(item.inputs, item.targets, strict=True)]


def _padded(rows: list[list[int]], filler: int, device: torch.device) -> torch.Tensor:
    table = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler)
    return table.to(device, non_blocking=True)


def _tree_mask(branches: torch.Tensor) -> torch.Tensor:
    """(B, T) branches -> (B, 1, T, T): a token sees what stands before it on the trunk and on its own branch."""
    T = branches.shape[1]
    on_path = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    return (on_path & torch.ones(T, T, dtype=torch.bool, device=branches.device).tril())[:, None]


def _token_scores(model, trees: list[Tree], *, tree_model: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 log-probability of every target of a batch, and whether it is the likeliest token; both (targets,)."""
    device = model.device
    input_ids = _padded([tree.tokens for tree in trees], 0, device)  # (B, T)
    T = input_ids.shape[1]
    columns = torch.tensor([row * T + at for row, tree in enumerate(trees) for at in tree.predicted_at])
    targets = torch.tensor([target for tree in trees for target in tree.targets])
    columns, targets = columns.to(device, non_blocking=True), targets.to(device, non_blocking=True)
    if not tree_model:
        logits = model(input_ids, use_cache=False).logits  # (B, T, V)
        return _score_columns(logits.flatten(0, 1), torch.nn.Identity(), columns, targets)
    arguments = {}
    if any(tree.branches[-1] for tree in trees):
        arguments["attention_mask"] = _tree_mask(_padded([tree.branches for tree in trees], FILLER, device))
        arguments["position_ids"] = _padded([tree.positions for tree in trees], 0, device)
    states = model.base_model(input_ids, use_cache=False, **arguments).last_hidden_state  # (B, T, C)
    return _score_columns(states.flatten(0, 1), model.get_output_embeddings(), columns, targets)


def _score_columns(states, head, columns: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `_token_scores` returns, from states (B * T, C): the head and the softmax of HEAD_ROWS columns at once."""
    log_probs, likeliest = [], []
    for rows, target in zip(columns.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        logits = head(states[rows]).float()  # (HEAD_ROWS, V)
        log_probs.append(logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1))
        likeliest.append(logits.argmax(1) == target)
    return torch.cat(log_probs), torch.cat(likeliest)


@torch.no_grad()
def score_items(
    model,
    items: Sequence[Sequences],
    *,
    batch_size: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    share_prefix: bool = True,
    progress: bool = False,
) -> list[dict]:
    """Scores and predictions of this process's share of the items, `batch_size` items a forward (None: what fills it).

    Items are sorted by length, so that a batch has little padding, and dealt to the processes like cards. The model
    runs eagerly: shapes are ragged. The caller has set `model.eval()`.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give at least 1")
    tree_model = model.config.model_type in TREE_MODELS
    share = share_prefix and tree_model and model.config._attn_implementation == "sdpa"
    limit = max_positions(model)
    grown = [grow_trees(item, share=share, max_length=limit) for item in items]
    size = [max(len(tree.tokens) for tree in trees) for trees in grown]
    mine = sorted(range(len(items)), key=lambda index: (-size[index], index))[rank::world_size]
    budget, first, batches, parts = BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"]), 0, [], []
    while first < len(mine):  # the first item of a batch is its longest
        fitting = budget // (len(grown[mine[first]]) * size[mine[first]])
        batches.append(mine[first : first + (batch_size or max(1, fitting))])
        first += len(batches[-1])
    with torch.compiler.set_stance("force_eager"):
        for batch in tqdm(batches, unit="batch", disable=None if progress and rank == 0 else True):
            trees = [tree for index in batch for tree in grown[index]]
            parts.append(_token_scores(model, trees, tree_model=tree_model))
    if not parts:
        return []
    # Read once, at the end: a read at every batch would let the device wait for the host.
    log_probs, likeliest = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    ends = np.cumsum([len(target) for index in mine for target in items[index].targets])[:-1]
    choices = zip(np.split(log_probs.astype(np.float64), ends), np.split(likeliest, ends), strict=True)
    return [_result(index, items[index], [next(choices) for _ in items[index].targets]) for index in mine]


def _result(index: int, item: Sequences, choices: list[tuple[np.ndarray, np.ndarray]]) -> dict:
    """An item's row of the results; a choice is its tokens' log-probabilities, and whether each is the likeliest."""
    scores = [float(log_probs.sum()) for log_probs, _ in choices]
    prediction, prediction_norm = choose(scores, item.lengths)
    if len(choices) == 1:  # the last word of a text: right if every token of it is the likeliest, else no choice
        prediction = prediction_norm = 0 if choices[0][1].all() else -1
    return {
        "index": index,
        "scores": scores,
        "lengths": item.lengths,
        "prediction": prediction,
        "prediction_norm": prediction_norm,
        "label": item.label,
        "truncated": item.truncated,
    }


def choose(scores: Sequence[float], lengths: Sequence[float]) -> tuple[int, int]:
    """The likeliest choice, and the likeliest for its length; the first of equals."""
    return int(np.argmax(scores)), int(np.argmax(np.asarray(scores) / np.asarray(lengths)))


def accuracy(
    predictions: Sequence[Sequence[float]], references: Sequence[int], lengths: Sequence[Sequence[float]]
) -> dict:
    """acc and acc_norm as fractions, with their standard errors (None for a single item), and n.

    `predictions` are the scores of every item's choices, `references` the right choices.
    """
    chosen = [choose(scores, own) for scores, own in zip(predictions, lengths, strict=True)]
    right = np.array(chosen) == np.array(references)[:, None]  # (n, 2)
    return {**_mean("acc", right[:, 0]), **_mean("acc_norm", right[:, 1]), "n": len(right)}


def _mean(name: str, right: np.ndarray) -> dict[str, float | None]:
    """A fraction and its standard error: the sample's standard deviation over sqrt(n)."""
    stderr = float(right.std(ddof=1) / len(right) ** 0.5) if len(right) > 1 else None
    return {name: float(right.mean()), f"{name}_stderr": stderr}


def summarise(results: Sequence[dict], compute: Callable[..., dict] = accuracy) -> dict:
    """The figures of all items of a task; `compute` is `accuracy` or that of the `evaluate` metric."""
    truncated = sum(result["truncated"] for result in results)
    if len(results[0]["scores"]) == 1:
        right = np.array([result["prediction"] == result["label"] for result in results])
        perplexity = float(np.exp(-np.mean([result["scores"][0] for result in results])))
        return {**_mean("acc", right), "perplexity": perplexity, "n": len(results), "truncated": truncated}
    arguments = {"predictions": "scores", "references": "label", "lengths": "lengths"}
    columns = {name: [result[key] for result in results] for name, key in arguments.items()}
    return {**compute(**columns), "truncated": truncated}


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
    model,
    tasks: Sequence[PreparedTask],
    *,
    rank: int = 0,
    world_size: int = 1,
    gather_object: Callable[[list], list] | None = None,
) -> list[dict]:
    """One row of figures per task, the same on every process: `{"task", "style", "acc", "acc_norm", "n", …}`.

    `gather_object` joins lists of all processes (as in accelerate.utils). Runs eagerly on the weights of a compiled
    model, in the precision of the caller's autocast; the model's training mode is put back afterwards.

    Raises:
        ValueError: several processes and no `gather_object`: the figures would be those of one share.
    """
    if world_size > 1 and gather_object is None:
        raise ValueError(f"world_size is {world_size}: give a gather_object that joins the processes' results")
    was_training = model.training
    model.eval()
    figures = []
    for task in tasks:
        results = score_items(model, task.items, rank=rank, world_size=world_size)
        results = gather_object(results) if gather_object else results
        figures.append({"task": task.task, "style": task.style, **summarise(results)})
    model.train(was_training)
    return figures


def command_parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmark commands share."""
    parser = model_parser(description)
    parser.add_argument("--data", help="JSONL file of the task's items (default: the Hub's dataset)")
    parser.add_argument(
        "--style", choices=["completion", "harness"],
        help="how items are rendered (default: completion for hellaswag, harness for every other task)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, help="score only the first N items (default: all)")
    parser.add_argument("--batch-size", type=int, help="items a forward (default: as fills it); changes no figure")
    parser.add_argument("--output", help="write the figures to this JSON file and the items to .jsonl beside it")
    return parser


def run_task(arguments: argparse.Namespace, task: str) -> dict | None:
    """Score one task as the command line says; under `accelerate launch` every process takes a share.

    Returns the figures, on the main process.
    """
    style = task_style(task, arguments.style)
    rows = read_rows(task, data=arguments.data, limit=arguments.limit)
    state = PartialState(cpu=arguments.device == "cpu")
    share = {"rank": state.process_index, "world_size": state.num_processes}
    if state.num_processes > 1:
        arguments.device = str(state.device)
    model, tokenizer = load_from(arguments)
    options = {"batch_size": arguments.batch_size, "progress": True, **share}
    results = gather_object(score_task(model, tokenizer, task, items=rows, style=style, **options))
    if not state.is_main_process:
        return None
    results.sort(key=lambda result: result["index"])
    compute = accuracy
    if find_spec("evaluate"):  # a machine that only scores may lack it; the metric calls the same function
        from .accuracy_metric import MultipleChoiceAccuracy

        compute = MultipleChoiceAccuracy().compute
    figures = {"task": task, "style": style, **summarise(results, compute)}
    known = {name: value for name, value in figures.items() if value is not None}
    print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in known.items()))
    if arguments.output:
        settings = {"model": arguments.model, "data": arguments.data, "dtype": arguments.dtype}
        write_json(output_file(arguments.output), {**figures, **settings})
        lines = [json.dumps(result) + "\n" for result in results]
        output_file(Path(arguments.output).with_suffix(".jsonl")).write_text("".join(lines), encoding="utf-8")
    return figures


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--task", required=True, choices=TASKS, metavar="T", help=", ".join(TASKS))
    arguments = parser.parse_args()
    run_task(arguments, arguments.task)


if __name__ == "__main__":
    run_command(main)
