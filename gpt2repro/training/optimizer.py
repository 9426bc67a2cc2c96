"""Parameter groups and the optimizer: AdamW as the GPT-3 paper has it (appendix B)."""

import torch
from torch import nn

from gpt2repro.training.arguments import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW in two groups: tensors of two dimensions and more decay, biases and LayerNorms do not.

    The learning rate is set at every step from `lr_at`; eps is 1e-8. The fused kernel is used where PyTorch has one
    for the device (CPU and CUDA among them).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda", "xpu", "mps") for p in parameters)
    return torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), eps=1e-8, fused=fused
    )
