"""The network against stock GPT-2: shapes, numbers, initialisation, loss, generation."""

import copy
import math
import warnings

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening, GPT2Config, GPT2LMHeadModel, StaticCache

import modeling_gpt2repro
from configuration_gpt2repro import NAMED_SHAPES, GPT2ReproConfig
from gpt2repro.hub.convert import TRANSPOSED, from_stock
from gpt2repro.hub.initial import recompute_activations
from modeling_gpt2repro import CACHE, GPT2ReproForCausalLM, halved_attention, halves_are_faster

TINY = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 64, "vocab_size": 300}


@pytest.fixture(scope="module")
def pair():
    """A random stock GPT-2 and its conversion."""
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(**TINY, bos_token_id=0, eos_token_id=0, initializer_range=0.2)).eval()
    return stock, from_stock(stock)


def some_ids(*shape: int, vocab_size: int = TINY["vocab_size"]) -> torch.Tensor:
    return torch.randint(1, vocab_size, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "count"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_named_shapes_have_the_parameters_and_keys_of_the_released_models(name, count):
    with torch.device("meta"):
        ours = GPT2ReproForCausalLM(GPT2ReproConfig(**NAMED_SHAPES[name]))
        stock = GPT2LMHeadModel(GPT2Config(**NAMED_SHAPES[name]))
    assert ours.num_parameters() == count == stock.num_parameters()
    assert ours.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize("shape", [(1, 1), (2, 40), (3, 64)])
def test_logits_and_loss_equal_stock_gpt2(pair, shape):
    stock, ours = pair
    ids = some_ids(*shape)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, stock(ids).logits, atol=1e-5, rtol=1e-5)
        if shape[1] > 1:
            torch.testing.assert_close(ours(ids, labels=ids).loss, stock(ids, labels=ids).loss)


def test_logits_equal_stock_gpt2_at_the_124m_shape():
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config()).eval()
    ours = from_stock(stock)
    for shape in [(1, 1), (2, 64)]:
        ids = some_ids(*shape, vocab_size=50257)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, stock(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_every_attention_implementation_computes_the_same(pair, implementation):
    stock, ours = pair
    ids = some_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    ours.set_attn_implementation(implementation)
    try:
        with torch.no_grad():
            seen = mask.bool()
            torch.testing.assert_close(ours(ids).logits, stock(ids).logits, atol=2e-5, rtol=1e-5)
            masked = ours(ids, attention_mask=mask).logits[seen]
            torch.testing.assert_close(masked, stock(ids, attention_mask=mask).logits[seen], atol=2e-5, rtol=1e-5)
    finally:
        ours.set_attn_implementation("sdpa")


@pytest.mark.parametrize("T", [2, 7, 256])
def test_halved_attention_computes_what_pytorchs_kernel_does(T):
    query, key, value = (torch.randn(2, 3, T, 16, requires_grad=True) for _ in range(3))
    found, _ = halved_attention(torch.nn.Identity(), query, key, value, None, scaling=0.25)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.25).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((mixed * weight).sum(), (query, key, value)) for mixed in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_halved_attention_stands_in_for_short_causal_sequences_in_bf16_on_a_cpu_alone():
    def faster(T, *, S=None, dtype=torch.bfloat16, mask=None, device="cpu", is_causal=True):
        query, key = (torch.empty(1, 1, length, 8, dtype=dtype, device=device) for length in (T, S or T))
        return halves_are_faster(query, key, mask, is_causal)

    assert faster(2) and faster(256)
    assert not (faster(1) or faster(257) or faster(1, S=9) or faster(4, S=9))
    assert not (faster(9, dtype=torch.float32) or faster(9, mask=torch.ones(9, 9)) or faster(9, device="meta"))
    assert not faster(9, is_causal=False)


def test_the_backward_pass_equals_stock_gpt2s(pair):
    stock, ours = pair
    ids = some_ids(2, 40)
    stock(ids, labels=ids).loss.backward()
    ours(ids, labels=ids, skip_logits=True, use_cache=False).loss.backward()
    expected = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = expected[name].grad
        if gradient.shape != parameter.shape or name.endswith("c_proj.weight"):
            gradient = gradient.t()
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    stock.zero_grad()
    ours.zero_grad()


def test_weights_are_initialised_as_gpt2_has_it():
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig())
    residual = 0.02 / math.sqrt(2 * 12)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            expected = residual if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(parameter.mean().item()) < 0.05 * expected, name
    assert model.lm_head.weight is model.transformer.wte.weight
    ids = some_ids(2, 128, vocab_size=50257)
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(50257), abs=0.15)


def test_the_padded_head_gives_the_loss_and_gradients_of_the_plain_one(pair):
    _, ours = pair
    ids, targets = some_ids(2, 40), some_ids(2, 40).roll(1)
    targets[0, :5] = -100
    results = []
    for skip_logits in (False, True):
        output = ours(ids, shift_labels=targets, skip_logits=skip_logits, use_cache=False)
        output.loss.backward()
        results.append([output.loss.detach(), *(p.grad for p in ours.parameters())])
        ours.zero_grad()
        assert (output.logits is None) == skip_logits
    for plain, padded in zip(*results, strict=True):  # not bitwise: the two matmuls may run in other kernels
        torch.testing.assert_close(padded, plain, atol=1e-7, rtol=1e-5)


def test_num_items_in_batch_divides_the_summed_loss(pair):
    _, ours = pair
    ids, targets = some_ids(2, 10), some_ids(2, 10).roll(1)
    targets[1, 3:] = -100
    with torch.no_grad():
        mean = ours(ids, shift_labels=targets, skip_logits=True).loss
        summed = ours(ids, shift_labels=targets, skip_logits=True, num_items_in_batch=1).loss
        logits = ours(ids).logits
    torch.testing.assert_close(summed, F.cross_entropy(logits.view(-1, 300), targets.view(-1), reduction="sum"))
    torch.testing.assert_close(mean * 13, summed)


def test_greedy_generation_equals_stock_gpt2s_with_and_without_cache(pair):
    stock, ours = pair
    ids = some_ids(2, 9)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    expected = stock.generate(ids, **settings)
    assert torch.equal(ours.generate(ids, **settings), expected)
    assert torch.equal(ours.generate(ids, use_cache=False, **settings), expected)
    assert torch.equal(ours.generate(ids, cache_implementation="static", **settings), expected)


def test_left_padded_prompts_generate_what_single_prompts_do(pair):
    _, ours = pair
    prompts = [some_ids(1, n)[0] for n in (3, 9, 6)]
    batch = torch.stack([F.pad(prompt, (9 - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones_like(prompt), (9 - len(prompt), 0)) for prompt in prompts])
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = ours.generate(batch, attention_mask=mask, **settings)
    for row, prompt in enumerate(prompts):
        alone = ours.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **settings)
        assert torch.equal(together[row, 9:], alone[0, len(prompt) :])


def test_a_static_cache_gives_the_logits_of_a_full_pass(pair):
    _, ours = pair
    ids = some_ids(1, 12)
    cache = StaticCache(config=ours.config, max_cache_len=32)
    with torch.no_grad():
        full = ours(ids).logits
        ours(ids[:, :8], use_cache=True, **{CACHE: cache})
        positions = torch.arange(8, 12)[None]
        rest = ours(ids[:, 8:], use_cache=True, position_ids=positions, **{CACHE: cache}).logits
    torch.testing.assert_close(rest, full[:, 8:], atol=2e-5, rtol=1e-5)


def test_logits_to_keep_computes_only_those_positions(pair):
    _, ours = pair
    ids = some_ids(2, 12)
    with torch.no_grad():
        full = ours(ids).logits
        torch.testing.assert_close(ours(ids, logits_to_keep=1).logits, full[:, -1:])
        torch.testing.assert_close(ours(ids, logits_to_keep=torch.tensor([3, 7])).logits, full[:, [3, 7]])


def test_gradient_checkpointing_changes_no_gradient(pair):
    ours = from_stock(pair[0]).train()
    ids = some_ids(2, 20)
    gradients = []
    for enabled in (False, True):
        if enabled:
            recompute_activations(ours)
        torch.manual_seed(0)  # dropout is on: the second pass must draw what the first one drew
        ours(ids, labels=ids, skip_logits=True, use_cache=False).loss.backward()
        gradients.append([p.grad for p in ours.parameters()])
        ours.zero_grad()
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept, atol=1e-7, rtol=1e-5)


def test_training_attends_without_a_mask_tensor_in_one_compiled_graph(pair):
    _, ours = pair
    ids = some_ids(2, 16)
    explanation = torch._dynamo.explain(ours)(ids, shift_labels=ids, use_cache=False, skip_logits=True)
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)
    attention = [
        node for graph in explanation.graphs for node in graph.graph.nodes
        if "scaled_dot_product_attention" in str(node.target)
    ]  # fmt: skip
    assert len(attention) == TINY["n_layer"]
    assert all(node.kwargs["is_causal"] is True and node.kwargs["attn_mask"] is None for node in attention)


def test_resized_embeddings_survive_a_round_trip(pair, tmp_path):
    ours = from_stock(pair[0])
    ours.resize_token_embeddings(310)
    ours.save_pretrained(tmp_path)
    loaded = GPT2ReproForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 310
    assert torch.equal(loaded.lm_head.weight, ours.lm_head.weight)
    ids = some_ids(1, 8)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, ours(ids).logits)
        assert loaded(ids, labels=ids, skip_logits=True).loss.isfinite()


def test_one_batch_is_overfitted():
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**TINY))
    ids = some_ids(4, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(ids[:, :-1], shift_labels=ids[:, 1:], use_cache=False, skip_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_bad_sizes_are_named_together():
    with pytest.raises(StrictDataclassError) as caught:
        GPT2ReproConfig(n_embd=100, n_head=3, vocab_size=0, attn_pdrop=1.5)
    for part in ("vocab_size is 0", "n_embd=100 is not a multiple of n_head=3", "attn_pdrop is 1.5"):
        assert part in str(caught.value)


def test_a_sequence_longer_than_n_positions_is_refused(pair):
    with pytest.raises(ValueError, match="65 tokens is longer than the model's n_positions=64"):
        pair[1](some_ids(1, 65))


def test_skip_logits_without_targets_is_refused(pair):
    with pytest.raises(ValueError, match="give labels or shift_labels"):
        pair[1](some_ids(1, 4), skip_logits=True)


# ---- what the library and its users pass to `forward` ------------------------------------------------------------


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache_continue_a_text(pair, name, monkeypatch):
    monkeypatch.setattr(warnings, "warn", lambda *arguments, **options: None)  # since 5.24 one name is deprecated
    stock, ours = pair
    ids = some_ids(2, 20)
    with torch.no_grad():
        first = ours(ids[:, :12], use_cache=True)
        second = ours(ids[:, 12:], use_cache=True, **{name: first[CACHE]})
        torch.testing.assert_close(second.logits, stock(ids).logits[:, 12:], atol=1e-5, rtol=1e-5)
    assert second[CACHE].get_seq_length() == 20
    with pytest.raises(ValueError, match="two names of one argument"):
        ours(ids, cache=first[CACHE], past_key_values=first[CACHE])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_continues_from_a_cache_under_both_names(pair, name, monkeypatch):
    monkeypatch.setattr(warnings, "warn", lambda *arguments, **options: None)
    _, ours = pair
    ids = some_ids(1, 12)
    whole = ours.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        seen = ours(ids[:, :8], use_cache=True)[CACHE]
    if name == "cache" and CACHE != "cache":
        pytest.skip("this release of the library does not know the name")
    continued = ours.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, **{name: seen})
    assert torch.equal(continued, whole)


@pytest.mark.parametrize("name", ["token_type_ids", "encoder_hidden_states", "past_key_value", "shift_label", "foo"])
def test_a_keyword_that_the_model_does_not_know_is_refused_by_name(pair, name):
    _, ours = pair
    for model in (ours, ours.transformer):
        with pytest.raises(TypeError, match=rf"does not know {name}: .*output_hidden_states"):
            model(some_ids(1, 5), **{name: None})


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_texts_have_the_logits_that_they_have_alone(pair, implementation, dtype):
    """Positions that restart, with more tokens in a row than the model has positions."""
    ours = from_stock(pair[0]).to(dtype)
    ours.set_attn_implementation(implementation)
    texts = [some_ids(1, length) for length in (64, 40, 3, 50)]
    packed = torch.cat(texts, dim=1)
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    with torch.no_grad():
        together = ours(packed, position_ids=positions).logits
        alone = torch.cat([ours(text).logits for text in texts], dim=1)
    atol = 1e-5 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(together.float(), alone.float(), atol=atol, rtol=1e-4)


def test_the_librarys_flattening_collator_packs_a_batch(pair):
    stock, ours = pair
    rows = [{"input_ids": some_ids(1, length)[0].tolist()} for length in (40, 30, 20)]
    batch = DataCollatorWithFlattening(return_tensors="pt")(rows)
    losses, counts = [], []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        losses.append(stock(ids, labels=ids).loss.item())
        counts.append(ids.shape[1] - 1)
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert ours(**batch).loss.item() == pytest.approx(expected, abs=1e-5)


def test_positions_past_the_table_are_one_error(pair):
    _, ours = pair
    with pytest.raises(ValueError, match="position 64 is past the model's n_positions=64"):
        ours(some_ids(1, 4), position_ids=torch.tensor([[61, 62, 63, 64]]))
    with pytest.raises(ValueError, match=r"n_positions=64"):
        ours.generate(some_ids(1, 60), max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention_without_a_causal_mask_is_stock_gpt2s(pair, implementation, dtype):
    stock = copy.deepcopy(pair[0]).to(dtype)
    ours = from_stock(pair[0]).to(dtype)
    for model in (stock, ours):
        model.set_attn_implementation(implementation)
    ids = some_ids(2, 20)
    with torch.no_grad():
        causal = ours(ids, use_cache=False).logits
        both = [model(ids, is_causal=False, use_cache=False).logits.float() for model in (ours, stock)]
    torch.testing.assert_close(*both, atol=1e-5 if dtype == torch.float32 else 0.15, rtol=1e-4)
    assert (both[0] - causal.float()).abs().max() > 0.5


def test_every_linear_layer_is_of_the_type_that_quantizers_replace(pair):
    _, ours = pair
    assert {type(module) for module in ours.modules() if isinstance(module, torch.nn.Linear)} == {torch.nn.Linear}


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_the_classification_heads_are_stock_gpt2s(pair, kind, tmp_path):
    stock_class = getattr(transformers, f"GPT2For{kind}")
    our_class = getattr(modeling_gpt2repro, f"GPT2ReproFor{kind}")
    config = GPT2Config(**TINY, num_labels=3, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    stock = stock_class(config).eval()
    ours = our_class(GPT2ReproConfig(**TINY, num_labels=3, pad_token_id=0, bos_token_id=0, eos_token_id=0)).eval()
    state = {name: tensor.t() if name.endswith(TRANSPOSED) else tensor for name, tensor in stock.state_dict().items()}
    renamed = {name.replace("classifier.", "score."): tensor for name, tensor in state.items()}
    ours.load_state_dict(renamed)
    ids = some_ids(2, 12)
    labels = torch.tensor([1, 2]) if kind.startswith("Sequence") else ids % 3
    with torch.no_grad():
        expected, found = stock(ids, labels=labels), ours(ids, labels=labels)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss)
    ours.save_pretrained(tmp_path)
    auto_class = getattr(transformers, f"AutoModelFor{kind}")
    loaded = auto_class.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, found.logits)
