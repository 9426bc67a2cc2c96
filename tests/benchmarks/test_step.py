"""The training step on this machine's best device: both forms of the loss, compiled and eager, against stock GPT-2.

On a machine with a GPU these are the checks that come before any figure (benchmarks/gpu_suite.py).
"""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.hub.convert import from_stock
from gpt2repro.hub.initial import recompute_activations
from gpt2repro.recipe import Recipe
from gpt2repro.train.devices import CHOICES
from gpt2repro.train.launch import loss_form
from modeling_gpt2repro import GPT2ReproForCausalLM

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# 1200 tokens make three chunks, the last one ragged; 5003 ids are padded to 5120.
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 128, "n_positions": 300, "vocab_size": 5003}
BATCH = (4, 300)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    config = GPT2ReproConfig(**SHAPE, bos_token_id=0, eos_token_id=0, initializer_range=0.1)
    return GPT2ReproForCausalLM(config).train().to(DEVICE)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and next tokens; a sixth of the targets are ignored."""
    ids = torch.randint(SHAPE["vocab_size"], (BATCH[0], BATCH[1] + 1), generator=torch.Generator().manual_seed(1))
    inputs, targets = ids[:, :-1].to(DEVICE), ids[:, 1:].clone().to(DEVICE)
    targets[1, 20:220] = -100
    return inputs, targets


def loss_and_gradients(model, *, call=None, bf16: bool = False, **settings) -> dict[str, torch.Tensor]:
    inputs, targets = batch()
    model.zero_grad()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=bf16):
        settings = {"shift_labels": targets, "use_cache": False, "skip_logits": True, **settings}
        loss = (model if call is None else call)(inputs, **settings).loss
    (loss / 2).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return {"loss": loss.detach(), **gradients}


def worst_difference(actual: dict, expected: dict) -> float:
    """The largest ||actual - expected|| / ||expected|| over the loss and all gradients."""
    return max(((actual[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)


@pytest.fixture(scope="module")
def plain(model):
    return loss_and_gradients(model)


def test_the_chunked_loss_has_the_value_and_gradients_of_the_plain_one(model, plain):
    chunked = loss_and_gradients(model, loss_impl="chunked")
    assert abs(chunked["loss"] - plain["loss"]) < 1e-5
    assert worst_difference(chunked, plain) < 1e-5


def test_the_chunked_loss_shifts_labels_and_divides_by_the_items_of_the_batch(model):
    inputs, _ = batch()
    for items in (7, torch.tensor(7, device=DEVICE)):
        settings = {"labels": inputs, "shift_labels": None, "num_items_in_batch": items}
        actual = loss_and_gradients(model, loss_impl="chunked", **settings)
        assert worst_difference(actual, loss_and_gradients(model, **settings)) < 1e-5


def test_in_bf16_the_chunked_loss_is_as_near_to_fp32_as_the_plain_one(model, plain):
    errors = {
        form: worst_difference(loss_and_gradients(model, bf16=True, loss_impl=form), plain)
        for form in ("plain", "chunked")
    }
    assert errors["plain"] < 0.03
    assert errors["chunked"] < 1.2 * errors["plain"]
    actual = loss_and_gradients(model, bf16=True, loss_impl="chunked")
    assert actual["loss"].dtype == torch.float32
    assert abs(actual["loss"] - plain["loss"]) < 1e-3 * plain["loss"]


@pytest.mark.parametrize("form", ["plain", "chunked"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_compiled_step_is_one_graph_and_computes_what_the_eager_one_does(model, plain, form, bf16):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    actual = loss_and_gradients(model, call=compiled, bf16=bf16, loss_impl=form)
    assert worst_difference(actual, plain) < (0.03 if bf16 else 2e-5)
    again = loss_and_gradients(model, call=compiled, bf16=bf16, loss_impl=form)
    assert worst_difference(again, actual) < 1e-5
    counted = torch._dynamo.utils.counters
    assert (counted["stats"]["unique_graphs"], sum(counted["graph_break"].values())) == (1, 0)


class Watch(TorchDispatchMode):
    """Counts reads of the device by the host and keeps the largest result."""

    def __init__(self):
        super().__init__()
        self.reads, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "is_nonzero", "unique")):
            self.reads.append(str(function))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("form", ["plain", "chunked"])
def test_a_micro_step_reads_nothing_back_to_the_host(model, form):
    with Watch() as watch:
        loss_and_gradients(model, loss_impl=form, bf16=True)
    assert not watch.reads
    with Watch() as watch:
        torch.ones((), device=DEVICE).item()
    assert watch.reads  # or the test could not fail


def test_the_chunked_loss_never_holds_the_logits_of_all_tokens(model):
    largest = {}
    for form in ("plain", "chunked"):
        with Watch() as watch:
            loss_and_gradients(model, loss_impl=form)
        largest[form] = watch.largest
    assert largest["plain"] >= BATCH[0] * BATCH[1] * SHAPE["vocab_size"]
    assert largest["chunked"] == max(512 * 5120, 5120 * SHAPE["n_embd"])


def test_a_compiled_step_with_the_chunked_loss_keeps_no_logits_for_the_backward(model):
    inputs, targets = batch()
    largest = {}
    for form in ("plain", "chunked"):
        torch.compiler.reset()
        compiled, kept = torch.compile(model, fullgraph=True, dynamic=False), []

        def keep(tensor, kept=kept):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            compiled(inputs, shift_labels=targets, use_cache=False, skip_logits=True, loss_impl=form)
        largest[form] = max(kept)
    assert largest["plain"] == BATCH[0] * BATCH[1] * 5120
    assert largest["chunked"] == SHAPE["vocab_size"] * SHAPE["n_embd"]


def test_without_gradients_the_chunked_loss_computes_none(model, plain):
    inputs, targets = batch()
    with torch.no_grad(), Watch() as watch:
        loss = model(inputs, shift_labels=targets, skip_logits=True, loss_impl="chunked").loss
    torch.testing.assert_close(loss, plain["loss"])
    assert not loss.requires_grad and watch.largest == 512 * 5120


def test_gradient_checkpointing_works_with_the_chunked_loss(model, plain):
    recomputing = copy.deepcopy(model)
    recompute_activations(recomputing)
    actual = loss_and_gradients(recomputing, loss_impl="chunked")
    assert worst_difference(actual, plain) < 1e-5


def test_logits_and_loss_equal_stock_gpt2_on_this_device():
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(**SHAPE, bos_token_id=0, eos_token_id=0)).eval()
    ours = from_stock(stock).to(DEVICE)
    stock.to(DEVICE)
    inputs, _ = batch()
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs).logits, stock(inputs).logits, atol=2e-5, rtol=1e-5)
        expected = stock(inputs, labels=inputs).loss
        for form in ("plain", "chunked"):
            actual = ours(inputs, labels=inputs, skip_logits=True, loss_impl=form).loss
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"loss_impl": "liger", "skip_logits": True}, {"loss_impl": "chunked"}])
def test_a_loss_impl_without_effect_is_refused(model, settings):
    inputs, targets = batch()
    with pytest.raises(ValueError, match=r"give 'plain', or 'chunked' together with skip_logits=True"):
        model(inputs, shift_labels=targets, **settings)


def test_auto_takes_the_plain_loss_on_a_cpu_only():
    assert {kind for kind, auto in CHOICES.items() if auto.loss_impl == "plain"} == {"CPU", "CPU with bf16"}
    assert loss_form(Recipe(), torch.device("cpu")) == "plain"
    assert loss_form(Recipe(loss_impl="chunked"), torch.device("cpu")) == "chunked"


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: CUDA itself reports the synchronisations")
@pytest.mark.parametrize("form", ["plain", "chunked"])
def test_cuda_sees_no_synchronisation_in_a_micro_step(model, form):
    inputs, targets = batch()
    settings = {"shift_labels": targets, "use_cache": False, "skip_logits": True, "loss_impl": form}
    for mode in ("default", "error"):  # the first pass sets up kernels and workspaces
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(inputs, **settings).loss
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        model.zero_grad()
