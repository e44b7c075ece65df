"""The SwiGLU MLP on the CPU: one pass over memory for everything between its linear layers."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from policies.layers import kernel_calls, native
from policies.layers.replacement import ForwardReplacement

SWIGLU_CLASSES = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
"""Classes of transformers that compute exactly down(act(gate(x)) · up(x)); act is a setting."""


class SwigluForward(ForwardReplacement):
    """Replaces the forward pass of a SwiGLU MLP: the same numbers, up to rounding."""

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Whether the module is such an MLP, with SiLU as its activation."""
        return type(module).__name__ in SWIGLU_CLASSES and module.config.hidden_act == "silu"

    def __call__(self, x: Tensor) -> Tensor:
        mlp = self.module
        gate = mlp.gate_proj(x)  # [..., inner]
        up = mlp.up_proj(x)  # [..., inner]
        if native.runs(gate, up):
            return mlp.down_proj(_Swiglu.apply(gate.contiguous(), up.contiguous()))  # [..., H]
        return mlp.down_proj(mlp.act_fn(gate) * up)  # [..., H]


class _Swiglu(torch.autograd.Function):
    """silu(gate) · up, all `[..., inner]`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return kernel_calls.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return kernel_calls.swiglu_backward(gate, up, out_gradient.contiguous())
