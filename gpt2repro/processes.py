"""What the processes of a run do together: share the main one's outcome, gather sharded tensors (FSDP2)."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def on_main_process(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """Run `action` on the main process while the others wait for it; all of them return what it returned.

    Raises:
        ValueError: on every process, with the main one's message, when it failed there.
    """
    outcome: list[Any] = [None, None]  # what came back, and the message of a failure
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except (OSError, ValueError) as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def on_every_process(action: Callable[[], Any]) -> Any:
    """Run `action`, which itself waits for no other process, on all of them; each returns what it returned there.

    Raises:
        ValueError: on every process, with the message of the first one where it failed, or its own.
    """
    outcome, problem = None, None
    try:
        outcome = action()
    except (OSError, ValueError) as error:
        problem = str(error)
    problems = gather_object([problem])
    if any(found is not None for found in problems):
        raise ValueError(problem if problem is not None else next(found for found in problems if found is not None))
    return outcome


def check_same(accelerator: Accelerator, what: str, value: Any) -> None:
    """Raise ValueError on every process if one has another value than the main one: an old copy of a file."""
    main_value = on_main_process(accelerator, lambda: value)

    def compare() -> None:
        if value != main_value:
            rank = accelerator.process_index
            raise ValueError(f"process {rank} has {what} that process 0 has not: give both the same")

    on_every_process(compare)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all its shards; every process calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unsharded(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or for a sharded one a model of the same architecture without weights (on the meta device).

    FSDP2 gives a model a class of its own, whose file save_pretrained would copy.
    """
    if not isinstance(model, FSDPModule):
        return model
    architecture: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    with torch.device("meta"):
        plain = architecture(model.config)
    plain.generation_config = model.generation_config
    return plain


def gathered(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or a whole copy of a sharded one on this process's device."""
    if not isinstance(model, FSDPModule):
        return model
    copy = unsharded(model).to_empty(device=model.device)
    targets = dict(copy.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            targets[name].copy_(whole(parameter))
    copy.tie_weights()
    return copy.train(model.training)
