"""Muon for matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon): an orthogonalised momentum as the update.

PyTorch's `torch.optim.Muon` with `match_rms_adamw` has the same updates. This one orthogonalises matrices of one shape
in one batch, can take several matrices out of one tensor, and knows two published changes: NorMuon and cautious decay.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from gpt2repro.processes import whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial that an iteration applies to every singular value
EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum, Nesterov's step, orthogonalisation, decoupled decay; an update has AdamW's RMS of 0.2 times the rate.

    Every group has `parts`: how many matrices a tensor holds, one below the other; each is orthogonalised by itself.

    normalise: divide the rows of an update by their running RMS, which keeps the update's norm (Li et al. 2025,
        "NorMuon", arXiv 2510.05491, algorithm 1).
    cautious: decay only the weights that the update makes smaller (Chen et al. 2025, "Cautious Weight Decay",
        arXiv 2510.12402).
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float, momentum: float = 0.95,
        row_beta: float = 0.95, normalise: bool = False, cautious: bool = False,
    ) -> None:  # fmt: skip
        self.normalise, self.cautious = normalise, cautious
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "row_beta": row_beta})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        found = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        raw = [part for group, p in found for part in self._momentum(group, p).chunk(group["parts"])]
        parts = iter(orthogonalise(raw))
        for group, p in found:
            update = torch.cat([next(parts) for _ in range(group["parts"])]).to(p.dtype)
            if self.normalise:
                update = self._normalised(group, p, update)
            if isinstance(p, DTensor):  # every process has the whole update and takes its shard of it
                update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
            rows, columns = p.shape[0] // group["parts"], p.shape[1]
            decay = group["lr"] * group["weight_decay"]
            if self.cautious:
                p.addcmul_(p, (update * p > 0).to(p.dtype), value=-decay)
            else:
                p.mul_(1 - decay)
            # 0.2 * sqrt(max(A, B)): Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2
            p.add_(update, alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)

    def _momentum(self, group: dict[str, Any], p: Tensor) -> Tensor:
        """Take the gradient into the momentum; returns Nesterov's mixture of both, whole."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        return whole(p.grad.lerp(momentum, group["momentum"]))

    def _normalised(self, group: dict[str, Any], p: Tensor, update: Tensor) -> Tensor:
        """The update with rows of even size and its old norm; a part keeps its own norm."""
        state = self.state[p]
        squares = update.square().mean(dim=1, keepdim=True)  # (rows, 1)
        if "row_squares" not in state:
            state["row_squares"] = torch.zeros_like(squares)
        mean_squares = state["row_squares"].lerp_(squares, 1 - group["row_beta"])
        even = (update / (mean_squares.sqrt() + EPS)).chunk(group["parts"])
        old = update.chunk(group["parts"])
        return torch.cat([new * (was.norm() / new.norm().clamp(min=EPS)) for new, was in zip(even, old, strict=True)])


def orthogonalise(matrices: list[Tensor]) -> list[Tensor]:
    """About U V^T for each matrix U S V^T, by five Newton-Schulz iterations in bf16, in batches of one shape.

    The singular values come out between about 0.7 and 1.2, which is enough for an update.
    """
    a, b, c = COEFFICIENTS
    same_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        same_shape[tuple(sorted(matrix.shape))].append(index)
    result = list(matrices)
    for (rows, _), indices in same_shape.items():
        tall = [matrices[index].shape[0] > rows for index in indices]
        X = torch.stack([matrices[i].mT if t else matrices[i] for i, t in zip(indices, tall, strict=True)]).bfloat16()
        X /= X.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
        for _ in range(5):
            gram = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
        for index, x, t in zip(indices, X, tall, strict=True):
            result[index] = x.mT if t else x
    return result
