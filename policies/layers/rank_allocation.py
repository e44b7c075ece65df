"""AdaLoRA's allocation of ranks: Zhang et al. 2023, "Adaptive budget allocation for parameter-efficient fine-tuning".

The change of a layer is P Λ Q. A triplet is one singular value of Λ with its column of P and its row of Q. PEFT stores
Q as `lora_A` `[rank, in]`, Λ as `lora_E` `[rank, 1]` and P as `lora_B` `[out, rank]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SMOOTHING = 0.85
"""β₁ and β₂, the weights of the past in the moving averages, for all tasks of the paper."""

TRIPLET_NAMES = ("left", "values", "right")
"""The tensors of a layer, in the order of `Triplets.tensors`."""


@dataclass(frozen=True)
class Triplets:
    """The trained tensors of one layer.

    Attributes:
        left: P, `[out, rank]`.
        values: Λ, `[rank, 1]`.
        right: Q, `[rank, in]`.
    """

    left: nn.Parameter
    values: nn.Parameter
    right: nn.Parameter

    @property
    def tensors(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """P, Λ and Q."""
        return self.left, self.values, self.right


def budget(progress: float, start: float, end: float, initial: int, target: int) -> int:
    """The number of triplets that are kept, over all layers (section 3.3).

    Args:
        progress: The share of the training steps that are done after this one.
        start: The share up to which all triplets are kept.
        end: The share from which the target is kept.
        initial: The number of triplets of all layers.
        target: The number of triplets that remain.
    """
    if progress <= start:
        return initial
    if progress >= end:
        return target
    remaining = 1 - (progress - start) / (end - start)
    return int(target + (initial - target) * remaining**3)


def orthogonality(layers: Sequence[Triplets]) -> Tensor:
    """How far P and Q are from orthogonal matrices: the mean of ‖PᵀP - I‖ and ‖QQᵀ - I‖ over the layers, `[]`.

    These are Frobenius norms as in the authors' code, and not their squares as in section 3.1.
    """
    norms: list[Tensor] = []
    for layer in layers:
        identity = torch.eye(len(layer.values), device=layer.values.device)  # [rank, rank]
        norms.append(torch.linalg.matrix_norm(layer.left.T @ layer.left - identity))
        norms.append(torch.linalg.matrix_norm(layer.right @ layer.right.T - identity))
    return torch.stack(norms).mean()


class RankAllocator(nn.Module):
    """Decides which triplets are kept, by moving averages that are its buffers and thus part of checkpoints."""

    def __init__(self, layers: Sequence[Triplets]) -> None:
        """Start with averages of zero, for all adapted layers of a role."""
        super().__init__()
        self.layers = list(layers)
        self.initial = sum(len(layer.values) for layer in layers)
        for number, layer in enumerate(layers):
            for name, tensor in zip(TRIPLET_NAMES, layer.tensors, strict=True):
                self.register_buffer(f"{number}_{name}_sensitivity", torch.zeros_like(tensor))
                self.register_buffer(f"{number}_{name}_uncertainty", torch.zeros_like(tensor))

    @torch.no_grad()
    def observe(self) -> None:
        """Update the averages with the gradients of the loss (section 3.2), unless one of them is not finite."""
        importances: list[tuple[int, str, Tensor]] = []
        for number, layer in enumerate(self.layers):
            for name, tensor in zip(TRIPLET_NAMES, layer.tensors, strict=True):
                if tensor.grad is None or not tensor.grad.isfinite().all():
                    return
                importances.append((number, name, (tensor * tensor.grad).abs()))
        for number, name, importance in importances:
            sensitivity, uncertainty = self._averages(number, name)
            sensitivity.lerp_(importance, 1 - SMOOTHING)
            uncertainty.lerp_((importance - sensitivity).abs(), 1 - SMOOTHING)

    @torch.no_grad()
    def keep(self, count: int) -> None:
        """Set all singular values to zero but those of the most important triplets, `count` over all layers."""
        scores = [self.scores(number) for number in range(len(self.layers))]  # [rank] each
        joined = torch.cat(scores)
        kept = torch.zeros_like(joined, dtype=torch.bool)
        kept[joined.topk(count).indices] = True
        for layer, mask in zip(self.layers, kept.split([len(score) for score in scores]), strict=True):
            layer.values.masked_fill_(~mask.unsqueeze(1), 0.0)

    def scores(self, number: int) -> Tensor:
        """The importance `[rank]` of each triplet of a layer: of its singular value and its vectors (section 3.2)."""
        left, values, right = (torch.mul(*self._averages(number, name)) for name in TRIPLET_NAMES)
        return values.squeeze(1) + left.mean(0) + right.mean(1)

    def _averages(self, number: int, name: str) -> tuple[Tensor, Tensor]:
        """The averages of a tensor's sensitivity and uncertainty."""
        prefix = f"{number}_{name}"
        return self.get_buffer(f"{prefix}_sensitivity"), self.get_buffer(f"{prefix}_uncertainty")
