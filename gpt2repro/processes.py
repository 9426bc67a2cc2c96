"""What the processes of a run do together: share the main one's outcome, gather sharded tensors (FSDP2)."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
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
