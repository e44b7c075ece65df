"""RMSNorm with a frozen weight on the CPU, forward and backward, in one pass over memory each."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from policies.layers import kernel_calls, native
from policies.layers.replacement import ForwardReplacement

RMS_NORM_CLASSES = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm", "OlmoeRMSNorm")
"""Classes of transformers that compute exactly weight · x / √(mean x² + ε)."""


class RmsNormForward(ForwardReplacement):
    """Replaces the forward pass of a norm: the same numbers, up to rounding; both compute in float32."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the module is of one of these classes."""
        return type(module).__name__ in RMS_NORM_CLASSES

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.module
        weight = norm.weight
        if weight.requires_grad or not native.runs(x, weight):
            return self.module_forward(x)
        return _RmsNorm.apply(x.contiguous(), weight, float(norm.variance_epsilon))


class _RmsNorm(torch.autograd.Function):
    """x: `[..., H]`; weight: `[H]`, without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out, scales = kernel_calls.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scales = ctx.saved_tensors
        return kernel_calls.rms_norm_backward(x, weight, scales, out_gradient.contiguous()), None, None
