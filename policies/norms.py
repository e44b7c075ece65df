"""RMSNorm with a frozen weight on the CPU, forward and backward, in as few passes over memory as it needs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PLAIN = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm", "OlmoeRMSNorm")
"""Classes of transformers that compute weight · x / √(mean x² + ε) and nothing else."""


class FrozenRmsNorm:
    """Takes the place of a norm's own forward: the same numbers, up to rounding. It computes in float32, as they do."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the module is such a norm, on the CPU."""
        return type(module).__name__ in PLAIN and module.weight.device.type == "cpu"

    def __init__(self, norm: nn.Module) -> None:
        self.norm, self.own = norm, norm.forward

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.norm.weight
        if weight.requires_grad or weight.dtype != x.dtype:
            return self.own(x)
        return _RmsNorm.apply(x, weight, self.norm.variance_epsilon)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = _wide(x)
        squares = torch.linalg.vecdot(wide, wide).unsqueeze(-1)
        scale = (squares / x.shape[-1] + epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        inner, wide = _wide(gradient * weight), _wide(x)
        along = torch.linalg.vecdot(inner, wide).unsqueeze(-1) * scale.square() / x.shape[-1]
        return inner.addcmul_(wide, along, value=-1).mul_(scale).to(x.dtype), None, None


def _wide(x: Tensor) -> Tensor:
    """In float32, or wider if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
