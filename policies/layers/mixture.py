"""Mixtures of linear layers with random routing: Wang et al. 2022, "AdaMix: mixture-of-adaptations"."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Mixture(nn.Module):
    """Several linear layers: in training one of them at a time computes the output, and otherwise their average.

    Attributes:
        weight: `[experts, out, in]`.
        bias: `[experts, out]`.
        expert: The number of the layer that computes in training.
    """

    def __init__(self, experts: Sequence[nn.Linear]) -> None:
        """Mix layers of the same sizes."""
        super().__init__()
        self.weight = nn.Parameter(torch.stack([expert.weight.detach() for expert in experts]))
        self.bias = nn.Parameter(torch.stack([expert.bias.detach() for expert in experts]))
        self.expert = 0

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        if self.training:
            return linear(x, self.weight[self.expert], self.bias[self.expert])
        return linear(x, self.weight.mean(0), self.bias.mean(0))
