"""Scores of multiple-choice items: the log-probability of every choice, in few forwards.

An item is one row of the batch: the context once, then all its continuations side by side. The attention mask lets a
continuation see the context and itself (a tree), and the positions of each continue those of the context. So the
context is computed once instead of once per choice, and the head is applied only where a continuation is predicted.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .accuracy import choose
from .loading import max_positions
from .tasks import Item

# The architectures whose trees were compared with one row per choice. Others (ALiBi, state spaces, sliding windows)
# may read positions from the mask's shape: they get one row per choice, and their own head.
TREE_MODELS = ("gpt2", "gpt2repro")
# Tokens of a forward, where the caller gives no batch size. Matmuls that outgrow a processor's caches ran at half
# speed; a GPU needs large ones.
BATCH_TOKENS = {"cpu": 384, "cuda": 16_384}
HEAD_ROWS = 2048  # positions that go through the head at once: 2048 * 50257 * 4 bytes = 0.4 GB of logits
FILLER = -1  # token, position and branch of padding


@dataclass(frozen=True)
class Sequences:
    """An item in tokens: the input of every choice, and the tokens at its end that are scored."""

    inputs: list[list[int]]  # context + continuation without its last token
    targets: list[list[int]]  # the continuation
    lengths: list[float]
    label: int
    truncated: bool


def encode(items: Sequence[Item], tokenizer, *, max_length: int) -> list[Sequences]:
    """Tokens of every item, the context cut from the left where it does not fit `max_length` input tokens.

    Context and continuation are tokenised together, then cut where the context's own tokens end: spaces at the end of
    the context belong to the continuation. An empty context is the end-of-text token.

    Raises:
        ValueError: a continuation of no tokens, or of more than `max_length`; with the line of the file.
    """
    unique = list(dict.fromkeys(text for item in items for pair in _texts(item) for text in pair))
    special = not any(item.apart for item in items)  # a beginning of sequence belongs before a whole text only
    ids = dict(zip(unique, tokenizer(unique, add_special_tokens=special, verbose=False)["input_ids"], strict=True))
    return [_sequences(item, ids, start_id=tokenizer.eos_token_id, max_length=max_length) for item in items]


def _texts(item: Item) -> Iterator[tuple[str, str]]:
    """For every choice the context, and the text whose tokens hold the continuation."""
    for context, continuation in zip(item.contexts, item.continuations, strict=True):
        yield (context, continuation) if item.apart else (context.rstrip(), context + continuation)


def _sequences(item: Item, ids: dict[str, list[int]], *, start_id: int, max_length: int) -> Sequences:
    inputs, targets, truncated = [], [], False
    for context_text, text in _texts(item):
        context = ids[context_text]
        target = ids[text] if item.apart else ids[text][len(context) :]
        if not 1 <= len(target) <= max_length:
            raise ValueError(
                f"{item.where}: the continuation {text[-40:]!r} has {len(target)} tokens of its own, expected 1 to "
                f"{max_length}, what the model takes"
            )
        whole = [*(context or [start_id]), *target]
        truncated |= len(whole) > max_length + 1
        inputs.append(whole[-(max_length + 1) : -1])
        targets.append(target)
    lengths = item.lengths or [len(target) for target in targets]
    return Sequences(inputs, targets, [float(length) for length in lengths], item.label, truncated)


@dataclass(frozen=True)
class Tree:
    """One row of a batch: a shared beginning and its branches, and where in it the scored tokens are predicted."""

    cells: list[tuple[int, int, int]]  # token, position, branch: 0 for the shared beginning, 1 … for the choices
    predicted_at: list[int]  # columns of the row
    targets: list[int]


def make_tree(inputs: list[list[int]], targets: list[list[int]]) -> Tree:
    """The inputs as one row; tokens that all of them begin with stand in it once."""
    shared = len(os.path.commonprefix(inputs))  # noqa: RUF071 (it takes any sequences)
    cells = [(token, place, 0) for place, token in enumerate(inputs[0][:shared])]
    predicted_at = []
    for branch, (own, target) in enumerate(zip(inputs, targets, strict=True), start=1):
        shift = len(cells) - shared  # place p of this input is column p + shift, if not shared
        places = range(len(own) - len(target), len(own))
        predicted_at += [place if place < shared else place + shift for place in places]
        cells += [(token, place, branch) for place, token in enumerate(own[shared:], start=shared)]
    return Tree(cells, predicted_at, [token for target in targets for token in target])


def _rows(item: Sequences, *, share: bool, max_length: int) -> list[Tree]:
    """One row for all choices of an item, or one for each where they may not share or would be too long together."""
    if share and len((tree := make_tree(item.inputs, item.targets)).cells) <= max_length:
        return [tree]
    return [make_tree([own], [target]) for own, target in zip(item.inputs, item.targets, strict=True)]


def _tree_mask(branches: torch.Tensor) -> torch.Tensor:
    """(B, T) branches -> (B, 1, T, T): a token sees what stands before it on the trunk and on its own branch."""
    T = branches.shape[1]
    on_path = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    return (on_path & torch.ones(T, T, dtype=torch.bool, device=branches.device).tril())[:, None]


def _token_scores(model, trees: list[Tree]) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 log-probability of every target of a batch, and whether it is the likeliest token; both (targets,)."""
    device = model.device
    table = pad_sequence([torch.tensor(tree.cells) for tree in trees], batch_first=True, padding_value=FILLER)
    input_ids, positions, branches = table.to(device, non_blocking=True).unbind(-1)  # (B, T) each
    input_ids, T = input_ids.clamp(min=0), input_ids.shape[1]
    columns = torch.tensor([row * T + at for row, tree in enumerate(trees) for at in tree.predicted_at])
    targets = torch.tensor([target for tree in trees for target in tree.targets]).to(device, non_blocking=True)
    columns = columns.to(device, non_blocking=True)
    arguments = {}
    if any(tree.cells[-1][2] for tree in trees):
        arguments = {"attention_mask": _tree_mask(branches), "position_ids": positions.clamp(min=0)}
    if model.config.model_type in TREE_MODELS:
        states, head = model.base_model(input_ids, use_cache=False, **arguments)[0], model.get_output_embeddings()
    else:
        states, head = model(input_ids, use_cache=False).logits, torch.nn.Identity()
    log_probs, likeliest = [], []
    for rows, target in zip(columns.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        logits = head(states.flatten(0, 1)[rows]).float()  # (HEAD_ROWS, V)
        log_probs.append(logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1))
        likeliest.append(logits.argmax(1) == target)
    return torch.cat(log_probs), torch.cat(likeliest)


@torch.no_grad()
def score_items(
    model, items: Sequence[Sequences], *, batch_size: int | None = None, rank: int = 0, world_size: int = 1,
    share_prefix: bool = True, progress: bool = False,
) -> list[dict]:
    """Scores and predictions of this process's share of the items.

    A forward takes `batch_size` items (None: BATCH_TOKENS tokens). Items are sorted by length, so that a batch has
    little padding, and every process takes one of `world_size`. The model runs eagerly, because shapes are ragged.
    The caller has set `model.eval()`.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give at least 1")
    sdpa = model.config._attn_implementation == "sdpa"
    share, limit = share_prefix and sdpa and model.config.model_type in TREE_MODELS, max_positions(model)
    rows = [_rows(item, share=share, max_length=limit) for item in items]
    size = [max(len(row.cells) for row in own) for own in rows]
    own = sorted(range(len(items)), key=lambda index: (-size[index], index))[rank::world_size]
    budget, first, parts = BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"]), 0, []
    bar = tqdm(total=len(own), unit="item", disable=None if progress and rank == 0 else True)
    with torch.compiler.set_stance("force_eager"), bar:
        while first < len(own):
            # The first item of a batch is its longest.
            count = batch_size or max(1, budget // (len(rows[own[first]]) * size[own[first]]))
            batch = own[first : first + count]
            parts.append(_token_scores(model, [row for index in batch for row in rows[index]]))
            first += count
            bar.update(len(batch))
    if not parts:
        return []
    # Read once, at the end: a read at every batch would let the device wait for the host.
    log_probs, likeliest = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    ends = np.cumsum([len(target) for index in own for target in items[index].targets])[:-1]
    choices = zip(np.split(log_probs.astype(np.float64), ends), np.split(likeliest, ends), strict=True)
    return [_result(index, items[index], [next(choices) for _ in items[index].targets]) for index in own]


def _result(index: int, item: Sequences, choices: list[tuple[np.ndarray, np.ndarray]]) -> dict:
    """An item's row of the results; a choice is its tokens' log-probabilities, and whether each is the likeliest."""
    scores = [float(log_probs.sum()) for log_probs, _ in choices]
    prediction, prediction_norm = choose(scores, item.lengths)
    if len(choices) == 1:  # the last word of a text: right if every token of it is the likeliest, else no choice
        prediction = prediction_norm = 0 if choices[0][1].all() else -1
    return {
        "index": index, "scores": scores, "lengths": item.lengths, "prediction": prediction,
        "prediction_norm": prediction_norm, "label": item.label, "truncated": item.truncated,
    }
