"""Parameter groups and the optimizer: AdamW as the GPT-3 paper has it (appendix B), or Muon beside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from gpt2repro.recipe import Recipe
from gpt2repro.train.muon import Muon


def make_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.Optimizer:
    """What the recipe's `optimizer` asks for.

    adamw: tensors of two dimensions and more decay, biases and LayerNorms do not; eps is 1e-8. The fused kernel is
    used where PyTorch has one for the device (CPU and CUDA among them).

    muon: Muon for the matrices of the blocks, AdamW as above for all else: both embeddings (and with them the tied
    head) and the vectors. Its update has the size of AdamW's, so the learning rate and the decay tuned for AdamW
    serve both; `muon_learning_rate` and `muon_weight_decay` set other values.

    Every group carries `lr_ratio`, its learning rate as a multiple of `lr_at`'s.
    """
    matrices = hidden_matrices(model)
    rest = [p for p in model.parameters() if p.requires_grad and p not in matrices]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2], "lr_ratio": recipe.embedding_lr_ratio},
        {"params": [p for p in rest if p.dim() < 2], "lr_ratio": recipe.vector_lr_ratio, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        groups.insert(0, {"params": [*matrices], "lr_ratio": 1.0})
    adamw = torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), eps=1e-8,
        weight_decay=recipe.weight_decay, fused=model.device.type in ("cpu", "cuda", "xpu", "mps"),
    )  # fmt: skip
    if recipe.optimizer == "muon":
        return SideBySide(_make_muon(matrices, recipe), adamw, ema_decay=recipe.ema_decay)
    return SideBySide(adamw, ema_decay=recipe.ema_decay) if recipe.ema_decay else adamw


def _make_muon(matrices: dict[torch.Tensor, str], recipe: Recipe) -> Muon:
    ratio = 1.0 if recipe.muon_learning_rate is None else recipe.muon_learning_rate / recipe.learning_rate
    parts: dict[int, list[torch.Tensor]] = {3: [], 1: []}  # query, key and value are three matrices in one tensor
    for matrix, name in matrices.items():
        parts[3 if recipe.muon_split_qkv and name.endswith("c_attn") else 1].append(matrix)
    return Muon(
        [{"params": params, "parts": count, "lr_ratio": ratio} for count, params in parts.items() if params],
        lr=recipe.learning_rate * ratio, momentum=recipe.muon_momentum, normalise=recipe.muon_normalise_rows,
        weight_decay=recipe.weight_decay if recipe.muon_weight_decay is None else recipe.muon_weight_decay,
        cautious=recipe.muon_cautious_decay,
    )  # fmt: skip


def hidden_matrices(model: PreTrainedModel) -> dict[torch.Tensor, str]:
    """The trained weights of all linear maps but the head, with the maps' names: c_attn, c_fc and both c_proj."""
    head = model.get_output_embeddings().weight  # tied, it is the token embedding
    linear = {module.weight: name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {weight: name for weight, name in linear.items() if weight is not head and weight.requires_grad}


class SideBySide(torch.optim.Optimizer):
    """Several optimizers, each with parameters of its own, as one: to prepare, to step, to save by parameter name.

    Groups and state are kept here, where Accelerate and `torch.distributed.checkpoint.state_dict` look for them, and
    lent to the parts for their step. A state that was loaded, or parameters that FSDP2 replaced, so reach them too.

    ema_decay: above 0, the state of every parameter also holds `ema`, the exponential moving average of its values.
    """

    def __init__(self, *parts: torch.optim.Optimizer, ema_decay: float = 0.0) -> None:
        self.parts, self.ema_decay = parts, ema_decay
        super().__init__([group for part in parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = list(islice(groups, len(part.param_groups)))
            part.state = self.state
            part.step()
        if self.ema_decay:
            for parameter, state in self.state.items():
                if "ema" not in state:
                    state["ema"] = parameter.detach().clone()
                state["ema"].lerp_(parameter, 1 - self.ema_decay)


@contextmanager
def averaged_weights(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the parameters of `model` have the values of their moving averages."""

    @torch.no_grad()
    def swap() -> None:
        for parameter, state in optimizer.state.items():  # in place: FSDP2 keeps views of the parameters
            average = state["ema"].clone()
            state["ema"].copy_(parameter)
            parameter.copy_(average)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # else the next forward takes the values that the last one gathered

    swap()
    try:
        yield
    finally:
        swap()
