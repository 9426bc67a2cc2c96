"""The scorer's trees against one forward per choice: random items, shared prefixes, many architectures."""

import copy
import math
import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from eval.scoring import TREE_MODELS, Sequences, make_batches, make_trees, score_items

VOCABULARY = 200


SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_positions=64, n_layer=2, n_head=2, n_embd=32, initializer_range=0.3, **SMALL)
    return GPT2LMHeadModel(config).eval()


def architecture(model_type: str, **more):
    """A tiny random model of the library, of any architecture."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "max_position_embeddings": 64}
    narrow = {"word_embed_proj_dim": 32, "ffn_dim": 64} if model_type == "opt" else {"intermediate_size": 64}
    narrow = {} if model_type == "gptj" else narrow
    keys = {"num_key_value_heads": 2} if model_type in ("llama", "mistral", "qwen2", "qwen3", "olmo2") else {}
    rotary = {"gptj": {"rotary_dim": 4}}.get(model_type, {})
    config = AutoConfig.for_model(model_type, **SMALL, **shape, **narrow, **keys, **rotary, **more)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # so large that what a token sees matters
        torch.nn.init.normal_(parameter, std=0.3)
    return model


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
    (tree,) = make_trees(queries, n_embd=768)
    assert len(tree.tokens) == 60 + 2 * (1 + 1 + 2)  # a question and what precedes the last token of each end
    unshared = make_trees(queries, n_embd=None)
    assert [len(row.tokens) for row in unshared] == [62, 63, 62, 63]  # an input that begins another is inside it


@pytest.mark.parametrize("budget", [384, 16_384])
@pytest.mark.parametrize("n_embd", [768, None])
def test_a_tenth_of_a_batch_is_padding_at_most_and_no_row_is_left_out(budget, n_embd):
    queries = {
        (tuple(tokens), tuple(targets))
        for own in ragged_items(300)
        for tokens, targets in zip(own.inputs, own.targets, strict=True)
        if targets
    }
    trees = make_trees(queries, n_embd=n_embd)
    batches = list(make_batches(trees, budget=budget))
    assert sorted(query for batch in batches for tree in batch for query in tree.queries) == sorted(queries)
    for batch in batches:
        sizes = [len(tree.tokens) for tree in batch]
        assert 10 * sum(sizes) >= 9 * len(sizes) * max(sizes)
        assert len(sizes) == 1 or len(sizes) * max(sizes) <= budget


OTHERS = {"bloom": {}, "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8}}
TREES = {model_type: {} for model_type in sorted({*TREE_MODELS} - {"gpt2", "gpt2repro", "mistral"})}


@pytest.mark.parametrize(
    ("model_type", "more"),
    [*TREES.items(), *OTHERS.items(), ("mistral", {"sliding_window": None}), ("mistral", {"sliding_window": 8})],
)
def test_every_architecture_has_the_scores_of_forwards_of_its_own(model_type, more):
    model = architecture(model_type, **more)
    items = ragged_items(24)
    for result, expected in zip(in_order(score_items(model, items)), one_at_a_time(model, items), strict=True):
        assert result["scores"] == pytest.approx(expected, abs=1e-3, nan_ok=True)


@pytest.mark.parametrize("kind", ["LoraConfig", "PromptTuningConfig"])
def test_an_adapter_and_a_learned_prompt_are_part_of_the_scores(gpt2, kind):
    peft = pytest.importorskip("peft")
    options = {"LoraConfig": {"target_modules": ["c_attn"], "init_lora_weights": False}}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **options.get(kind, {"num_virtual_tokens": 3}))
    model = peft.get_peft_model(copy.deepcopy(gpt2), config).eval()
    items = ragged_items(8)
    results, plain = in_order(score_items(model, items)), one_at_a_time(gpt2, items)
    for result, expected in zip(results, one_at_a_time(model, items), strict=True):
        assert result["scores"] == pytest.approx(expected, abs=1e-4, nan_ok=True)
    assert results[0]["scores"] != pytest.approx(plain[0], abs=1e-2, nan_ok=True)
