"""The scalar head that turns a hidden state into a value or a reward."""

import torch
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """A linear map from hidden states to one number, in float32.

    Weights start as a normal sample of deviation 1/√(d+1) and the bias as zero (Stiennon et al. 2020, "Learning to
    summarize from human feedback", appendix B.1), so that first scores are of order one whatever the width d.
    """

    def __init__(self, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, generator=generator) / (width + 1) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(1))

    @classmethod
    def zeros(cls, width: int) -> "ScalarHead":
        """A head that says 0."""
        head = cls(width)
        head.weight.data.zero_()
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., H]`, any float dtype, to float32 scores `[...]`."""
        return hidden.float() @ self.weight + self.bias

    @torch.no_grad()
    def fold(self, mean: float, std: float) -> None:
        """Make the head give (score - mean) / deviation, in place."""
        self.bias.sub_(mean).div_(std)
        self.weight.div_(std)
