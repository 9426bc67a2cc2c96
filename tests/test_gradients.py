"""Every form of the loss, eager and compiled, fp32 and bf16, against the gradients of eager fp32 stock GPT-2."""

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2repro.hub.convert import TRANSPOSED, from_stock
from modeling_gpt2repro import chunked_cross_entropy

# bf16 keeps 8 bits: a product is within 2**-8, and some of them are summed.
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.02}


@pytest.fixture(scope="module")
def reference():
    """A stock model, a batch in two chunks, and the loss and gradients of the stock model by our names."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=4, n_embd=64, n_positions=64, vocab_size=500, initializer_range=0.1, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip
    stock = GPT2LMHeadModel(config).train()
    tokens = torch.randint(0, 500, (16, 65))
    ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    loss = F.cross_entropy(stock(ids).logits.flatten(0, 1), targets.flatten())
    loss.backward()
    gradients = {name: p.grad.t() if name.endswith(TRANSPOSED) else p.grad for name, p in stock.named_parameters()}
    return stock, ids, targets, loss.item(), gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("loss_impl", ["plain", "chunked"])
def test_every_parameters_gradient_is_that_of_stock_gpt2(reference, loss_impl, compiled, dtype):
    stock, ids, targets, expected_loss, expected = reference
    model = from_stock(stock).train()
    if compiled:
        torch._dynamo.reset()
        model.compile(fullgraph=True, dynamic=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(ids, shift_labels=targets, use_cache=False, skip_logits=True, loss_impl=loss_impl).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss, rel=LARGEST_ERROR[dtype])
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < LARGEST_ERROR[dtype], name


@pytest.mark.parametrize("probability", [0.9, 0.99, 0.998, 0.999, 0.9999])
def test_the_chunked_loss_keeps_the_gradient_of_a_target_that_is_nearly_certain(probability):
    """In bf16 a probability of 0.998 is 1: subtracted there, the gradient at the target would be gone."""
    V = 64
    logit = torch.tensor(probability * (V - 1) / (1 - probability)).log().item()
    hidden = torch.zeros(1, V, dtype=torch.bfloat16)
    hidden[0, 3] = 1.0
    weight = torch.zeros(V, V)
    weight[3, 3] = logit
    hidden, weight = hidden.requires_grad_(), weight.bfloat16().float().requires_grad_()
    F.cross_entropy(hidden.float() @ weight.t(), torch.tensor([3]), reduction="sum").backward()
    _, grad_hidden, grad_weight = chunked_cross_entropy(
        hidden, weight, torch.tensor([3]), padded_rows=V, chunk=512, with_gradients=True
    )
    torch.testing.assert_close(grad_weight[3, 3].float(), weight.grad[3, 3], rtol=0.01, atol=0)
    torch.testing.assert_close(grad_hidden[0, 3].float(), hidden.grad[0, 3].float(), rtol=0.02, atol=0)
