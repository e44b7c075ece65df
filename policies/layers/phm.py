"""PHM layers: linear layers whose weight is a sum of Kronecker products.

Zhang et al. 2021, "Beyond fully-connected layers with quaternions"; with shared first factors and second factors of low
rank Karimi Mahabadi et al. 2021, "Compacter: efficient low-rank hypercomplex adapter layers".

Shapes: n first factors of size n × n, inputs n · p, outputs n · q, rank r of the second factors.
"""

import torch
from torch import Tensor, nn


class PhmLinear(nn.Module):
    """x W + bias, with W = Σᵢ Aᵢ ⊗ (Lᵢ Rᵢ). The slow weights A are shared by many layers, L and R are its own."""

    def __init__(self, inputs: int, outputs: int, slow: nn.Parameter, rank: int) -> None:
        """Initialise L and R so that W has the variance of Glorot and Bengio (2010) where A has 1 / n.

        Args:
            inputs: Size of the input, a multiple of n.
            outputs: Size of the output, a multiple of n.
            slow: A, `[n, n, n]`, which whoever shares it registers.
            rank: r.
        """
        super().__init__()
        count = len(slow)
        deviation = (2 / (inputs + outputs) / rank) ** 0.25
        self.left = nn.Parameter(torch.randn(count, inputs // count, rank) * deviation)  # [n, p, r]
        self.right = nn.Parameter(torch.randn(count, rank, outputs // count) * deviation)  # [n, r, q]
        self.bias = nn.Parameter(torch.zeros(outputs))
        self._slow = (slow,)  # in a tuple, so that it is no parameter of this module

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        return x @ phm_weight(self._slow[0], self.left, self.right) + self.bias


def phm_weight(slow: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The sum of Kronecker products Aᵢ ⊗ (Lᵢ Rᵢ).

    Args:
        slow: A, `[n, n, n]`.
        left: L, `[n, p, r]`.
        right: R, `[n, r, q]`.

    Returns:
        `[n · p, n · q]`.
    """
    fast = left @ right  # [n, p, q]
    products = torch.einsum("iab,ipq->apbq", slow, fast)  # [n, p, n, q]
    return products.flatten(2).flatten(0, 1)  # [n · p, n · q]
