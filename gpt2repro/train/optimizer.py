"""Parameter groups and the optimizer: AdamW as the GPT-3 paper has it (appendix B), or Muon beside it."""

from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gpt2repro.recipe import Recipe


def make_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.Optimizer:
    """What the recipe's `optimizer` asks for.

    adamw: tensors of two dimensions and more decay, biases and LayerNorms do not; eps is 1e-8. The fused kernel is
    used where PyTorch has one for the device (CPU and CUDA among them).

    muon: PyTorch's Muon for the matrices of the blocks, AdamW as above for all else: both embeddings (and with them
    the tied head) and the vectors. `match_rms_adamw` scales an update of A x B by 0.2 * sqrt(max(A, B)), so that the
    learning rate and the decay tuned for AdamW serve both (Liu et al. 2025, "Muon is Scalable for LLM Training",
    section 2.2). Query, key and value are orthogonalised together, as the one matrix that they are in GPT-2.

    Every group carries `lr_ratio`, its learning rate as a multiple of `lr_at`'s.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = hidden_matrices(model) if recipe.optimizer == "muon" else []
    taken = set(map(id, matrices))
    rest = [p for p in parameters if id(p) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": recipe.weight_decay, "lr_ratio": 1.0},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, "lr_ratio": 1.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda", "xpu", "mps") for p in parameters)
    adamw = torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), eps=1e-8, fused=fused
    )
    if not matrices:
        return adamw
    ratio = 1.0 if recipe.muon_learning_rate is None else recipe.muon_learning_rate / recipe.learning_rate
    muon = torch.optim.Muon(
        [{"params": matrices, "lr_ratio": ratio}],
        lr=recipe.learning_rate * ratio, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    return SideBySide(muon, adamw)


def hidden_matrices(model: PreTrainedModel) -> list[torch.Tensor]:
    """The weights of all linear maps but the head: c_attn, c_fc and both c_proj of every block."""
    head = model.get_output_embeddings().weight  # tied, it is the token embedding
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [module.weight for module in linear if module.weight is not head and module.weight.requires_grad]


class SideBySide(torch.optim.Optimizer):
    """Several optimizers, each with parameters of its own, as one: to prepare, to step, to save by parameter name.

    Groups and state are kept here, where Accelerate and `torch.distributed.checkpoint.state_dict` look for them, and
    lent to the parts for their step. A state that was loaded, or parameters that FSDP2 replaced, so reach them too.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = list(islice(groups, len(part.param_groups)))
            part.state = self.state
            part.step()
