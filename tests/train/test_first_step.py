"""The first-step check: a sound step passes, a wrong gradient stops the run and names the setting that helps."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import modeling_gpt2repro
from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.data.loader import Documents
from gpt2repro.train.first_step import check_first_step
from modeling_gpt2repro import GPT2ReproForCausalLM
from tests.conftest import ROOT
from train_accelerate import micro_steps

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": 128}


@pytest.fixture(autouse=True)
def new_state():
    """Accelerate keeps one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def check(
    *, precision: str = "no", scale: float = 2.0**16, loss_impl: str = "plain", change=None, compiled: bool = False,
    documents: Documents | None = None, own=dict, **fields,
) -> str:
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    if precision == "fp16":  # as start_accelerator does it
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
    torch.manual_seed(0)
    raw = GPT2ReproForCausalLM(GPT2ReproConfig(**SHAPE | fields, bos_token_id=0, eos_token_id=0)).train()
    if change:
        change(raw)
    if compiled:
        torch._dynamo.reset()
        raw.compile(fullgraph=True, dynamic=False)
    model = accelerator.prepare(raw)
    tokens = torch.randint(0, raw.config.vocab_size, (4, 33))
    batch = {"input_ids": tokens[:, :-1].contiguous(), "shift_labels": tokens[:, 1:].contiguous()}
    if documents:
        batch |= documents.of(batch["input_ids"])
    before = {name: p.detach().clone() for name, p in raw.named_parameters()}
    try:
        return check_first_step(
            accelerator, raw,
            lambda batches, form: micro_steps(accelerator, model, map(own, batches), len(batches), form),
            batch, loss_impl=loss_impl, compiled=compiled,
        )  # fmt: skip
    finally:
        assert all(torch.equal(p, before[name]) and p.grad is None for name, p in raw.named_parameters())
        assert raw.training
        assert not accelerator.scaler or accelerator.scaler.get_scale() == scale


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("loss_impl", ["plain", "chunked"])
def test_a_sound_step_is_one_line(precision, loss_impl):
    line = check(precision=precision, loss_impl=loss_impl)
    assert line.startswith("first step: loss 4.8") and "gradients agree" in line and "\n" not in line


@pytest.mark.parametrize("restart", [False, True])
def test_a_step_whose_documents_see_each_other_stops_the_run(restart):
    options = {"documents": Documents(eot_id=1, restart=restart), "initializer_range": 0.2, "vocab_size": 8}
    assert "gradients agree" in check(**options)
    with pytest.raises(ValueError, match=r"the first step is wrong.*the gradient of"):
        check(**options, own=lambda batch: {name: batch[name] for name in ("input_ids", "shift_labels")})


def test_a_loss_scale_that_overflows_is_lowered_for_the_check_alone():
    assert "gradients agree" in check(precision="fp16", scale=2.0**30)


def test_a_model_with_dropout_is_compared_without_it():
    assert "gradients agree" in check(resid_pdrop=0.5, embd_pdrop=0.5)


@pytest.fixture
def zero_gradients(monkeypatch):
    """What torch 2.11 made of the compiled chunked loss: the loss is right, every gradient is zero."""

    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        return None, 0 * grad_hidden, 0 * grad_weight.to(ctx.weight_dtype), None, None

    monkeypatch.setattr(modeling_gpt2repro.WithGradients, "backward", staticmethod(backward))


def test_gradients_of_zero_stop_the_run_and_name_the_loss_that_helps(zero_gradients):
    with pytest.raises(ValueError, match=r"the first step is wrong, nothing was trained.*cosine 0.0000") as error:
        check(loss_impl="chunked")
    assert "transformer.wte.weight" in str(error.value)
    assert torch.__version__ in str(error.value)
    assert str(error.value).endswith("with --loss_impl plain it is right")


def test_a_compiler_that_drops_a_gradient_is_told_from_the_loss():
    def detach_while_compiling(raw):
        forward = raw.transformer.h[1].mlp.forward

        def broken(hidden_states):
            return forward(hidden_states.detach() if torch.compiler.is_compiling() else hidden_states)

        raw.transformer.h[1].mlp.forward = broken

    with pytest.raises(ValueError, match=r"with --compile false it is right$") as error:
        check(loss_impl="chunked", change=detach_while_compiling, compiled=True)
    assert "transformer.h.*." in str(error.value)


def test_a_loss_of_other_tokens_is_named():
    def shift_again(raw):
        class_forward = type(raw).forward

        def forward(*arguments, shift_labels, **options):
            return class_forward(raw, *arguments, shift_labels=shift_labels.roll(1, dims=1), **options)

        raw.forward = forward

    with pytest.raises(ValueError, match=r"the gradient of .* has cosine"):
        check(change=shift_again)


def test_a_run_with_wrong_gradients_ends_before_it_makes_its_folder(train_script, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import modeling_gpt2repro, train_accelerate\n"
        "def backward(ctx, grad_loss):\n"
        "    grad_hidden, grad_weight = ctx.saved_tensors\n"
        "    return None, 0 * grad_hidden, 0 * grad_weight.to(ctx.weight_dtype), None, None\n"
        "modeling_gpt2repro.WithGradients.backward = staticmethod(backward)\n"
        "sys.exit(train_accelerate.main())\n"
    )
    output = train_script(tmp_path / "run", script=broken, loss_impl="chunked", exit_code=1)
    assert "error: the first step is wrong, nothing was trained" in output
    assert "--loss_impl plain" in output
    assert not (tmp_path / "run").exists()


def test_two_processes_agree_on_their_first_step(train_script, tmp_path):
    output = train_script(tmp_path / "run", processes=2, max_steps=3)
    assert output.count("first step: loss ") == 1
    assert "gradients agree (cosine 1.00000" in output
