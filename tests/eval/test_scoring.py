"""The scorer's trees against one forward per choice: random items, shared prefixes, many architectures."""

import math
import random

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from eval.scoring import Sequences, make_trees, score_items

VOCABULARY = 200


def small(config_class, model_class, **shape):
    torch.manual_seed(0)
    config = config_class(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, initializer_range=0.3, **shape)
    return model_class(config).eval()


@pytest.fixture(scope="module")
def gpt2():
    return small(GPT2Config, GPT2LMHeadModel, n_positions=64, n_layer=2, n_head=2, n_embd=32)


def item(context: list[int], choices: list[list[int]]) -> Sequences:
    inputs = [(context + choice)[:-1] for choice in choices]
    return Sequences(inputs, choices, [float(len(choice)) for choice in choices], 0, False)


def ragged_items(count: int) -> list[Sequences]:
    """Items of 1 to 4 choices of 0 to 7 tokens; every other one begins with the same 30 tokens."""
    draw = random.Random(0)

    def tokens(most: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(draw.randint(0, most))]

    examples = [draw.randrange(VOCABULARY) for _ in range(30)]
    return [
        item((examples if index % 2 else [5]) + tokens(12), [tokens(7) for _ in range(1 + index % 4)])
        for index in range(count)
    ]


def in_order(results: list[dict]) -> list[dict]:
    return sorted(results, key=lambda result: result["index"])


@torch.no_grad()
def one_at_a_time(model, items: list[Sequences]) -> list[list[float]]:
    """The score of every choice from a forward of its own, without the scorer."""

    def score(tokens: list[int], targets: list[int]) -> float:
        if not targets:
            return math.nan
        log_probs = model(torch.tensor([tokens])).logits[0, -len(targets) :].log_softmax(-1)
        return log_probs.gather(1, torch.tensor(targets)[:, None]).sum().item()

    return [[score(*pair) for pair in zip(own.inputs, own.targets, strict=True)] for own in items]


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"batch_size": 5}, {"share_prefix": False}])
def test_every_score_is_that_of_a_forward_of_its_own(gpt2, options):
    items = ragged_items(40)
    results = in_order(score_items(gpt2, items, **options))
    for result, expected in zip(results, one_at_a_time(gpt2, items), strict=True):
        assert result["scores"] == pytest.approx(expected, abs=1e-4, nan_ok=True)


def test_equal_choices_have_equal_scores_and_the_first_is_predicted(gpt2):
    draw = random.Random(1)
    for length in range(1, 30):
        best, other = ([draw.randrange(VOCABULARY) for _ in range(length)] for _ in range(2))
        (scored,) = score_items(gpt2, [item([3] * length, [best, other])])
        choices = [best, other, best, other] if scored["prediction"] == 0 else [other, best, other, best]
        (result,) = score_items(gpt2, [item([3] * length, choices)])
        assert result["scores"][0] == result["scores"][2] and result["scores"][1] == result["scores"][3]
        assert result["prediction"] == result["prediction_norm"] == 0


def test_a_choice_without_tokens_has_no_score_and_is_not_predicted(gpt2):
    items = [item([1, 2], [[], [4, 5]]), item([1, 2], [[4, 5], []]), item([1], [[]]), item([], [[], []])]
    results = in_order(score_items(gpt2, items))
    assert [math.isnan(score) for score in results[0]["scores"]] == [True, False]
    assert [result["prediction"] for result in results[:3]] == [1, 0, -1]
    assert all(math.isnan(score) for score in results[3]["scores"])


def test_what_inputs_share_is_computed_once():
    examples, ends = list(range(60)), [[101], [102, 103], [104, 105, 106]]
    queries = [((*examples, question, *end[:-1]), tuple(end)) for question in (61, 62) for end in ends]
    (tree,) = make_trees(queries, n_embd=768, share=True)
    assert len(tree.tokens) == 60 + 2 * (1 + 1 + 2)  # a question and what precedes the last token of each end
    unshared = make_trees(queries, n_embd=768, share=False)
    assert [len(row.tokens) for row in unshared] == [62, 63, 62, 63]  # an input that begins another is inside it
