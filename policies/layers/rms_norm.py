"""RMSNorm with a frozen weight on the CPU, forward and backward, in one pass over memory each."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from policies.layers import native

PLAIN = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm", "OlmoeRMSNorm")
"""Classes of transformers that compute weight · x / √(mean x² + ε) and nothing else."""


class FrozenRmsNorm:
    """Takes the place of a norm's own forward: the same numbers, up to rounding. It computes in float32, as they do."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the module is such a norm."""
        return type(module).__name__ in PLAIN

    def __init__(self, norm: Any) -> None:
        self.norm, self.own = norm, norm.forward

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.norm.weight
        if weight.requires_grad or not native.runs(x, weight):
            return self.own(x)
        return _RmsNorm.apply(x.contiguous(), weight, float(self.norm.variance_epsilon))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out, scales = normed(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scales = ctx.saved_tensors
        of_x, given = torch.empty_like(x), (x, weight, scales, gradient.contiguous())
        native.call("norm_backward", x.dtype, *given, of_x, scales.numel(), x.shape[-1])
        return of_x, None, None


def normed(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """weight · x / √(mean x² + ε) of `[..., H]` (Zhang and Sennrich 2019), and what each x was multiplied by, `[...]`
    float32, on the CPU."""
    out, scales = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    native.call("norm", x.dtype, x, weight, out, scales, scales.numel(), x.shape[-1], epsilon)
    return out, scales
