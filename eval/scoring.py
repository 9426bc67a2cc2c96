"""Scores of multiple-choice items: the log-probability of every choice, in few forwards.

Choices that begin alike are one row of the batch: what they share once, then their ends side by side. The attention
mask lets a token see its own beginning and nothing else (a tree), and every token has its position in its own choice.
So the context of an item is computed once instead of once per choice, the few-shot examples of a task once for several
items, and the head is applied only where a continuation is predicted.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel

from .accuracy import choose
from .tasks import Item

# The architectures whose trees the tests compare with one forward per choice. Others (ALiBi, state spaces) may read
# positions from the mask's shape, or scale their logits: they get one row per choice, and their own head.
TREE_MODELS = ("gpt2", "gpt2repro", "gpt_neox", "gptj", "llama", "mistral", "olmo2", "opt", "phi", "qwen2", "qwen3")
# Tokens of a forward, where the caller gives no batch size. Matmuls that outgrow a processor's caches ran at half
# speed; a GPU needs large ones.
BATCH_TOKENS = {"cpu": 384, "cuda": 16_384}
HEAD_ROWS = 2048  # targets that are predicted at once: 2048 * 50257 * 4 bytes = 0.4 GB of logits

Query = tuple[tuple[int, ...], tuple[int, ...]]  # an input, and the tokens that are predicted at its end


@dataclass(frozen=True)
class Sequences:
    """An item in tokens: the input of every choice, and the tokens at its end that are scored."""

    inputs: list[list[int]]  # context + continuation without its last token
    targets: list[list[int]]  # the continuation
    lengths: list[float]
    label: int
    truncated: bool


def encode(items: Sequence[Item], tokenizer, *, max_length: int) -> list[Sequences]:
    """Tokens of every item, cut from the left where they do not fit `max_length` input tokens.

    Context and continuation are tokenised together, then cut where the context's own tokens end: spaces at the end of
    the context belong to the continuation. An empty context is the end-of-text token.

    Raises:
        ValueError: a continuation of no tokens; with the line of the file.
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
        if not target:
            raise ValueError(f"{item.where}: the continuation {text[-40:]!r} has no tokens of its own")
        whole = [*(context or [start_id]), *target]
        truncated |= len(whole) > max_length + 1
        inputs.append(whole[-(max_length + 1) : -1])
        targets.append(target[-max_length:])
    lengths = item.lengths or [len(target) for target in targets]
    return Sequences(inputs, targets, [float(length) for length in lengths], item.label, truncated)


@dataclass
class Tree:
    """One row of a batch: inputs that begin alike, in the order of their tokens; what they share stands once."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # the first column that does not continue this one; 0: there is none
    path: list[int] = field(default_factory=list)  # the columns of the last input
    queries: list[Query] = field(default_factory=list)
    predicted_at: list[int] = field(default_factory=list)  # the columns of all targets

    def add(self, query: Query, *, shared: int) -> None:
        """One more input, whose first `shared` tokens are those of the last one."""
        tokens, targets = query
        columns = range(len(self.tokens), len(self.tokens) + len(tokens) - shared)
        for column in self.path[shared:]:
            self.ends[column] = columns.start
        self.tokens += tokens[shared:]
        self.positions += range(shared, len(tokens))
        self.ends += [0] * len(columns)
        self.path = [*self.path[:shared], *columns]
        self.queries.append(query)
        self.predicted_at += self.path[len(tokens) - len(targets) :]


def make_trees(queries: Iterable[Query], *, n_embd: int | None) -> list[Tree]:
    """The queries as rows. Without `n_embd` no row has branches: only an input that continues another one joins it.

    In each layer a shared token saves 24 n_embd^2 FLOPs, and attention takes 4 n_embd for a pair of tokens, masked or
    not. So a row is best while the square of what its inputs do not share is below 6 n_embd times what they do.
    """
    trees: list[Tree] = []
    last: tuple[int, ...] = ()
    for tokens, targets in sorted(queries):
        shared = common_length([last, tokens])
        if 0 < shared < len(last):  # a branch
            not_shared = len(trees[-1].tokens) + len(tokens) - 2 * shared
            shared = shared if n_embd and not_shared**2 <= 6 * n_embd * shared else 0
        if not shared:
            trees.append(Tree())
        trees[-1].add((tokens, targets), shared=shared)
        last = tokens
    return trees


def make_batches(trees: list[Tree], *, budget: int, batch_size: int | None = None) -> Iterator[list[Tree]]:
    """The rows, long ones first: `budget` tokens at a time, at most a tenth of them padding, or `batch_size` rows."""
    batch: list[Tree] = []
    tokens = longest = 0
    for tree in sorted(trees, key=lambda tree: -len(tree.tokens)):
        tokens, padded = tokens + len(tree.tokens), (len(batch) + 1) * longest
        if batch and (len(batch) == batch_size if batch_size else padded > budget or 10 * tokens < 9 * padded):
            yield batch
            batch = []
        if not batch:
            tokens = longest = len(tree.tokens)
        batch.append(tree)
    if batch:
        yield batch


def common_length(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    return len(os.path.commonprefix(sequences))  # noqa: RUF071 (it takes any sequences)


def _tree_mask(ends: torch.Tensor) -> torch.Tensor:
    """(B, T) ends -> (B, 1, T, T): a token sees what stands before it and has not ended."""
    columns = torch.arange(ends.shape[1], device=ends.device)[:, None]
    continued = (ends[:, None, :] == 0) | (columns < ends[:, None, :])
    return (continued & (columns.T <= columns))[:, None]


def _takes_trees(model) -> bool:
    """Whether the model is known to give a token of a tree the states that it has in a row of its own."""
    # An adapter's wrapper (PEFT) is no PreTrainedModel. A sliding window counts columns of the row.
    known = isinstance(model, PreTrainedModel) and model.config.model_type in TREE_MODELS
    return known and getattr(model.config, "sliding_window", None) is None


def _token_scores(model, trees: list[Tree]) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 log-probability of every target of a batch, and the likeliest token in its place; both (targets,)."""
    device = model.device
    rows = [torch.tensor([tree.tokens, tree.positions, tree.ends]).T for tree in trees]
    table = pad_sequence(rows, batch_first=True).to(device, non_blocking=True)
    input_ids, positions, ends = table.unbind(-1)  # (B, T) each
    T = input_ids.shape[1]
    arguments = {}
    if any(any(tree.ends) for tree in trees):
        arguments = {"attention_mask": _tree_mask(ends), "position_ids": positions}
    if _takes_trees(model):
        states, head = model.base_model(input_ids, use_cache=False, **arguments)[0], model.get_output_embeddings()
    else:  # the last T: a learned prompt (PEFT) stands before the text
        states, head = model(input_ids, use_cache=False).logits[:, -T:], torch.nn.Identity()
    columns = torch.tensor([row * T + at for row, tree in enumerate(trees) for at in tree.predicted_at])
    targets = torch.tensor([token for tree in trees for _, own in tree.queries for token in own])
    log_probs, likeliest = [], []
    for own_columns, own_targets in zip(columns.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        # Several tokens may be predicted at one place: the letters that name the choices.
        places, at = (part.to(device, non_blocking=True) for part in own_columns.unique(return_inverse=True))
        logits = head(states.flatten(0, 1)[places]).float()  # (places, V)
        log_probs.append(logits[at, own_targets.to(device, non_blocking=True)] - logits.logsumexp(1)[at])
        likeliest.append(logits.argmax(1)[at])
    return torch.cat(log_probs), torch.cat(likeliest)


@torch.no_grad()
def score_items(
    model, items: Sequence[Sequences], *, batch_size: int | None = None, rank: int = 0, world_size: int = 1,
    share_prefix: bool = True, progress: bool = False,
) -> list[dict]:
    """Scores and predictions of this process's share of the items.

    A forward takes `batch_size` rows (None: BATCH_TOKENS tokens). Rows are sorted by length, so that a batch has
    little padding, and every process takes one item of `world_size`. What is asked twice is computed once: equal
    choices have equal scores. The model runs eagerly, because shapes are ragged. The caller has set `model.eval()`.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give at least 1")
    by_length = sorted(range(len(items)), key=lambda index: (-max(map(len, items[index].inputs)), index))
    queries = {index: list(_queries(items[index])) for index in by_length[rank::world_size]}
    share = share_prefix and model.config._attn_implementation == "sdpa" and _takes_trees(model)
    asked = {query for own in queries.values() for query in own if query[1]}
    budget = BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])
    trees = make_trees(asked, n_embd=model.config.hidden_size if share else None)
    batches, parts = list(make_batches(trees, budget=budget, batch_size=batch_size)), []
    bar = tqdm(total=len(asked), unit="choice", disable=None if progress and rank == 0 else True)
    with torch.compiler.set_stance("force_eager"), bar:
        for batch in batches:
            parts.append(_token_scores(model, batch))
            bar.update(sum(len(tree.queries) for tree in batch))
    answers: dict[Query, tuple[np.ndarray, np.ndarray]] = {}
    if parts:
        # Read once, at the end: a read at every batch would let the device wait for the host.
        log_probs, likeliest = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
        if np.isnan(log_probs).any():  # of which a choice would be the best one all the same
            raise ValueError(f"the scores are NaN in {model.dtype}: give --dtype float32, or an earlier checkpoint")
        answered = [query for batch in batches for tree in batch for query in tree.queries]
        ends = np.cumsum([len(targets) for _, targets in answered])[:-1]
        split = (np.split(log_probs.astype(np.float64), ends), np.split(likeliest, ends))
        answers = dict(zip(answered, zip(*split, strict=True), strict=True))
    nothing = (np.array([np.nan]), np.array([], dtype=np.int64))
    return [
        _result(index, items[index], [answers.get(query, nothing) for query in own]) for index, own in queries.items()
    ]


def _queries(item: Sequences) -> Iterator[Query]:
    for own, targets in zip(item.inputs, item.targets, strict=True):
        yield tuple(own), tuple(targets)


def _result(index: int, item: Sequences, choices: list[tuple[np.ndarray, np.ndarray]]) -> dict:
    """An item's row of the results; a choice is its tokens' log-probabilities, and the likeliest token at each place.

    A choice without tokens has the score NaN. A single choice, such as the last word of a text, is right if every
    token of it is the likeliest one; its row has the likeliest `tokens`.
    """
    scores = [float(log_probs.sum()) for log_probs, _ in choices]
    prediction, prediction_norm = choose(scores, item.lengths)
    tokens = {}
    if len(choices) == 1:
        tokens = {"tokens": choices[0][1].tolist()}
        prediction = prediction_norm = 0 if tokens["tokens"] == list(item.targets[0]) != [] else -1
    return {
        "index": index, "scores": scores, "lengths": item.lengths, "prediction": prediction,
        "prediction_norm": prediction_norm, "label": item.label, "truncated": item.truncated, **tokens,
    }
