"""The gated feed-forward part on the CPU, in float32: fewer passes over memory, and less kept for the way back."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

PLAIN = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
"""Classes of transformers that compute down(silu(gate(x)) · up(x)), if silu is what they are told, and nothing else."""


class GatedPart:
    """Takes the place of a feed-forward part's own forward: the same numbers, to the bit.

    In bfloat16 the gate costs more to make again than to keep, and the part's own forward it is.
    """

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Whether the module is such a part."""
        return type(module).__name__ in PLAIN and module.config.hidden_act == "silu"

    def __init__(self, part: Any) -> None:
        self.part, self.own = part, part.forward

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return self.own(x)
        part = self.part
        return part.down_proj(_Gated.apply(part.gate_proj(x), part.up_proj(x)))


class _Gated(torch.autograd.Function):
    """silu(gate) · up, element by element (Shazeer 2020)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = gradient * up, silu(gate).mul_(gradient)
        return torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate), of_up
