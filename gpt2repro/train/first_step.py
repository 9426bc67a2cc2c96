"""The first-step check: a run's own gradients against an eager fp32 reference, before the first update.

A wrong gradient does not show in the loss of the first steps: a compiler may return zeros, a loss may round its
gradient away. So a run takes its own step (loss form, compilation, precision, wrapper, accumulation) on one
micro-batch, takes it again in eager fp32 with the plain loss, and compares both before it changes a weight.
"""

import re
from collections.abc import Callable

import torch
import transformers
from accelerate import Accelerator
from transformers import PreTrainedModel

from gpt2repro.processes import gathered, whole

# How far a run may be from the reference: relative loss, 1 - cosine, relative norm of the gradients. At initialisation
# bf16 is within 1e-4, 1e-4 and 1e-3 (124M and 350M on a CPU); a trained model has smaller gradients and more noise.
TOLERANCES = {"no": (1e-3, 1e-3, 0.02), "bf16": (0.02, 0.03, 0.1), "fp16": (0.02, 0.03, 0.1)}

Batch = dict[str, torch.Tensor]
Gradients = dict[str, torch.Tensor]
Backward = Callable[[list[Batch], str], torch.Tensor]


def check_first_step(
    accelerator: Accelerator, raw: PreTrainedModel, backward: Backward, batch: Batch, *, loss_impl: str, compiled: bool
) -> str:
    """Compare the run's gradients of one micro-batch with the reference; returns one line that says how they agree.

    raw: the network, without the wrapper of several processes. backward: what the loop does with its micro-batches and
    a form of the loss: it leaves their mean gradient in `raw` and returns their mean loss. batch: what the model takes
    on this process, (B, T) each. Every process calls it. No weight changes, and no gradient stays. A model with
    dropout is compared in evaluation mode.

    Raises:
        ValueError: they differ by more than rounding. The message names the parameters, the versions, and the settings
            with which they agree.
    """
    training = raw.training
    raw.train(training and not any(m.p for m in raw.modules() if isinstance(m, torch.nn.Dropout)))
    try:
        own = _own(accelerator, raw, backward, batch, loss_impl)
        reference = _reference(accelerator, raw, batch)
        tolerance = TOLERANCES[accelerator.mixed_precision]
        problems, line = _compare(own, reference, tolerance)
        if not problems:
            return line
        attempts = {}
        if loss_impl != "plain":
            attempts["--loss_impl plain"] = _own(accelerator, raw, backward, batch, "plain")
        if compiled:
            with torch.compiler.set_stance("force_eager"):
                attempts["--compile false"] = _own(accelerator, raw, backward, batch, loss_impl)
        helps = [setting for setting, attempt in attempts.items() if not _compare(attempt, reference, tolerance)[0]]
        raise ValueError(
            f"the first step is wrong, nothing was trained: {'; '.join(problems)} (torch {torch.__version__}, "
            f"transformers {transformers.__version__}, loss_impl {loss_impl}, {'compiled' if compiled else 'eager'}, "
            f"mixed_precision {accelerator.mixed_precision}): "
            + (f"with {' or '.join(helps)} it is right" if helps else "report it, or use another release of torch")
        )
    finally:
        raw.train(training)


def _own(
    accelerator: Accelerator, raw: PreTrainedModel, backward: Backward, batch: Batch, loss_impl: str
) -> tuple[float, Gradients]:
    """The run's own loss, the mean over the processes, and gradients."""

    def run() -> torch.Tensor:
        # Twice the same micro-batch, so that accumulation is compared as well.
        return accelerator.reduce(backward([batch, batch], loss_impl), "mean")

    if not accelerator.scaler:
        return _gradients_of(raw, run)
    # In fp16 the scale falls until the gradients are finite, as in the run, which begins with its own scale.
    state, scale = accelerator.scaler.state_dict(), accelerator.scaler.get_scale()
    loss, gradients = _gradients_of(raw, run)
    while scale > 1 and not all(grad.isfinite().all() for grad in gradients.values()):
        scale /= 2
        accelerator.scaler.update(scale)
        loss, gradients = _gradients_of(raw, run)
    accelerator.scaler.load_state_dict(state)
    return loss, {name: grad / scale for name, grad in gradients.items()}


def _gradients_of(model: PreTrainedModel, backward: Callable[[], torch.Tensor]) -> tuple[float, Gradients]:
    """The loss that `backward` returns and the gradients that it leaves: whole, in host memory; then cleared."""
    model.zero_grad()
    loss = backward().item()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients[name] = whole(grad).to("cpu", copy=True)
    model.zero_grad()
    return loss, gradients


def _reference(accelerator: Accelerator, raw: PreTrainedModel, batch: Batch) -> tuple[float, Gradients]:
    """Loss and gradients in eager fp32 with the plain loss, the mean over the processes.

    One sequence at a time, so that it needs no more memory than the step. A sharded model is gathered first.
    """
    model = gathered(raw)
    forward = type(model).forward  # of the class: not compiled, and without the autocast of `accelerator.prepare`

    def backward() -> torch.Tensor:
        B = len(batch["input_ids"])
        total = torch.zeros((), device=model.device)
        for row in range(B):
            sequence = {name: part[row : row + 1] for name, part in batch.items()}
            loss = forward(model, **sequence, use_cache=False, skip_logits=True).loss
            (loss / B).backward()
            total += loss.detach() / B
        return total

    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa")  # flash kernels know no fp32
    try:
        with torch.compiler.set_stance("force_eager"), torch.autocast(model.device.type, enabled=False):
            loss, gradients = _gradients_of(model, backward)
    finally:
        model.set_attn_implementation(attention)
    if accelerator.num_processes > 1:
        loss = accelerator.reduce(torch.tensor(loss, device=model.device), "mean").item()
        for name, grad in gradients.items():
            gradients[name] = accelerator.reduce(grad.to(model.device), "mean").cpu()
    return loss, gradients


def _compare(
    own: tuple[float, Gradients], reference: tuple[float, Gradients], tolerance: tuple[float, float, float]
) -> tuple[list[str], str]:
    """What differs by more than `tolerance`, and a line for the case that nothing does.

    Gradients are compared by kind of parameter: a tensor's name without the number of its block.
    """
    (own_loss, own_gradients), (loss, gradients) = own, reference
    problems = []
    if not abs(own_loss - loss) <= tolerance[0] * abs(loss):
        problems.append(f"the loss is {own_loss:.4f}, in eager fp32 {loss:.4f}")
    sums: dict[str, list[float]] = {}  # kind -> own . own, reference . reference, own . reference
    for name, grad in gradients.items():
        a, b = own_gradients[name].flatten().float(), grad.flatten().float()
        kind = re.sub(r"\.\d+\.", ".*.", name)
        dots = (a.dot(a).item(), b.dot(b).item(), a.dot(b).item())
        sums[kind] = [total + dot for total, dot in zip(sums.get(kind, [0.0] * 3), dots, strict=True)]
    lowest_cosine, largest_ratio = 1.0, 0.0
    for kind, (own_square, square, product) in sums.items():
        if own_square == square == 0.0:
            continue
        cosine = product / (own_square * square) ** 0.5 if own_square and square else 0.0
        ratio = (own_square / square) ** 0.5 if square else float("inf")
        if not (cosine >= 1 - tolerance[1] and abs(ratio - 1) <= tolerance[2]):
            problems.append(f"the gradient of {kind} has cosine {cosine:.4f} and {ratio:.4f} of eager fp32's norm")
        lowest_cosine, largest_ratio = min(lowest_cosine, cosine), max(largest_ratio, abs(ratio - 1))
    if len(problems) > 4:
        problems[3:] = [f"and {len(problems) - 3} more"]
    return problems, (
        f"first step: loss {own_loss:.4f}, in eager fp32 {loss:.4f}; gradients agree (cosine {lowest_cosine:.5f} and "
        f"more, norms within {largest_ratio:.2%})"
    )
