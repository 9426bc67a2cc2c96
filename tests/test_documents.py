"""Documents that do not see each other: a packed window against its documents alone, in stock GPT-2."""

import copy
import itertools

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2repro.data.loader import Documents
from gpt2repro.hub.convert import TRANSPOSED, from_stock
from gpt2repro.hub.initial import recompute_activations, set_dropout

EOT, T = 7, 48
# Two windows: the first begins in the middle of a document, the second with one that is empty.
BEGINS = ((10, 11, 30), (0, 1, 40))


@pytest.fixture(scope="module")
def stock():
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 300}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=EOT, eos_token_id=EOT, initializer_range=0.2)).eval()


def windows(begins=BEGINS) -> dict[str, torch.Tensor]:
    """Input ids and next tokens of a window for each list of places where documents begin."""
    ids = torch.randint(8, 300, (len(begins), T + 1), generator=torch.Generator().manual_seed(1))
    for row, places in enumerate(begins):
        ids[row, torch.tensor(places, dtype=torch.long)] = EOT
    return {"input_ids": ids[:, :-1].contiguous(), "shift_labels": ids[:, 1:].contiguous()}


def documents_of(begins) -> list[slice]:
    """The places of every document of a window."""
    bounds = sorted({0, *begins, T})
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def test_a_document_begins_with_the_window_and_at_every_end_of_text():
    ids = torch.tensor([[3, EOT, 4, 5, EOT, EOT, 2], [EOT, 1, 1, 1, 1, EOT, 1], [1, 2, 3, 4, 5, 6, 8]])
    numbers, positions = [[0, 1, 1, 1, 2, 3, 3], [1, 1, 1, 1, 1, 2, 2], [0] * 7], [
        [0, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 0, 1], [*range(7)],
    ]  # fmt: skip
    assert {key: part.tolist() for key, part in Documents(EOT, restart=False).of(ids).items()} == {"seq_idx": numbers}
    assert {key: part.tolist() for key, part in Documents(EOT, restart=True).of(ids).items()} == {
        "position_ids": positions
    }


def stock_step(stock, batch, *, restart: bool) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, mean loss and gradients of windows whose documents go through stock GPT-2 one at a time."""
    model = copy.deepcopy(stock)
    logits = torch.empty(*batch["input_ids"].shape, 300)
    total = torch.zeros(())
    for row, begins in enumerate(BEGINS):
        for place in documents_of(begins):
            ids = batch["input_ids"][row, place][None]
            positions = torch.arange(ids.shape[1]) + (0 if restart else place.start)
            found = model(ids, position_ids=positions[None]).logits[0]
            logits[row, place] = found.detach()
            total = total + F.cross_entropy(found, batch["shift_labels"][row, place], reduction="sum")
    loss = total / batch["shift_labels"].numel()
    loss.backward()
    return logits, loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("restart", [False, True], ids=["positions run on", "positions restart"])
@pytest.mark.parametrize("setting", ["sdpa", "eager", "chunked", "checkpointing"])
def test_a_packed_window_has_the_logits_loss_and_gradients_of_its_documents_in_stock_gpt2(stock, restart, setting):
    batch = windows()
    logits, loss, gradients = stock_step(stock, batch, restart=restart)
    ours = from_stock(stock)
    ours.set_attn_implementation("eager" if setting == "eager" else "sdpa")
    if setting == "checkpointing":
        recompute_activations(ours)
        set_dropout(ours.train(), 0.0)
    batch |= Documents(EOT, restart=restart).of(batch["input_ids"])
    form = "chunked" if setting == "chunked" else "plain"
    own = ours(**batch, use_cache=False, skip_logits=True, loss_impl=form).loss
    own.backward()
    torch.testing.assert_close(own, loss, atol=1e-5, rtol=1e-5)
    for name, parameter in ours.named_parameters():
        expected = gradients[name].t() if name.endswith(TRANSPOSED) else gradients[name]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-3, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch, use_cache=False).logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("restart", [False, True])
def test_a_token_changes_nothing_in_another_document(stock, restart):
    ours, batch = from_stock(stock), windows()
    changed = batch["input_ids"].clone()
    changed[:, 20] += 1  # in the document of 11 to 29, and of 1 to 39
    with torch.no_grad():
        before, after = (
            ours(ids, **Documents(EOT, restart=restart).of(ids), use_cache=False).logits
            for ids in (batch["input_ids"], changed)
        )
    differing = (before != after).any(-1)
    assert differing[0, 20:30].all() and differing[1, 20:40].all()
    assert differing.sum() == 10 + 20


@pytest.mark.parametrize("restart", [False, True])
def test_one_graph_serves_windows_of_any_documents(stock, restart):
    torch._dynamo.reset()
    ours, graphs = from_stock(stock), []
    compiled = copy.deepcopy(ours)
    compiled.compile(backend=lambda module, _: graphs.append(module) or module.forward, fullgraph=True, dynamic=False)
    for begins in BEGINS, ((), ()), ((5,), tuple(range(T))):
        batch = windows(begins)
        batch |= Documents(EOT, restart=restart).of(batch["input_ids"])
        losses = []
        for model in ours, compiled:
            loss = model(**batch, use_cache=False, skip_logits=True).loss
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
    assert len(graphs) == 1
    for (name, own), other in zip(ours.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, own.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_numbers_of_texts_beside_a_mask_are_refused(stock):
    ids = windows()["input_ids"]
    with pytest.raises(ValueError, match="seq_idx parts the texts of whole rows: give it without attention_mask"):
        from_stock(stock)(ids, seq_idx=torch.zeros_like(ids), attention_mask=torch.ones_like(ids))
