"""The heads that turn a hidden state into a value, a reward, or the outputs of a classifier."""

import torch
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """A linear layer from hidden states to one number, in float32.

    Weights start as a normal sample with a standard deviation of 1/√(H+1) and the bias as zero (Stiennon et al. 2020,
    "Learning to summarize from human feedback", appendix B.1), so that the first scores are of order one whatever the
    hidden size H.
    """

    def __init__(self, width: int, generator: torch.Generator | None = None) -> None:
        """Initialise the weights.

        Args:
            width: The hidden size H.
            generator: The random generator of the initial weights; None: torch's global one.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, generator=generator) / (width + 1) ** 0.5)  # [H]
        self.bias = nn.Parameter(torch.zeros(1))

    @classmethod
    def zeros(cls, width: int) -> "ScalarHead":
        """A head whose scores are all 0."""
        head = cls(width)
        head.weight.data.zero_()
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores `[...]`, float32, of hidden states `[..., H]` of any float dtype."""
        return hidden.float() @ self.weight + self.bias

    @torch.no_grad()
    def fold(self, mean: float, std: float) -> None:
        """Change the head in place so that its scores become (score - mean) / std."""
        self.bias.sub_(mean).div_(std)
        self.weight.div_(std)


class LinearHead(nn.Module):
    """A linear layer from hidden states to C outputs, in float32, without a bias.

    transformers' sequence classifiers have none, so that an exported model has the same outputs. The weights start as
    those of `ScalarHead` do.
    """

    def __init__(self, width: int, outputs: int, generator: torch.Generator | None = None) -> None:
        """Initialise the weights.

        Args:
            width: The hidden size H.
            outputs: The number of outputs C.
            generator: The random generator of the initial weights; None: torch's global one.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, width, generator=generator) / (width + 1) ** 0.5)  # [C, H]

    def forward(self, hidden: Tensor) -> Tensor:
        """Outputs `[..., C]`, float32, of hidden states `[..., H]` of any float dtype."""
        return hidden.float() @ self.weight.T
