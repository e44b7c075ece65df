"""The gated feed-forward part on the CPU, in one pass over memory for what is not a product."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from policies.layers import native

PLAIN = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
"""Classes of transformers that compute down(silu(gate(x)) · up(x)), if silu is what they are told, and nothing else."""


class GatedPart:
    """Takes the place of a feed-forward part's own forward: the same numbers, up to rounding."""

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Whether the module is such a part."""
        return type(module).__name__ in PLAIN and module.config.hidden_act == "silu"

    def __init__(self, part: Any) -> None:
        self.part = part

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.part.gate_proj(x), self.part.up_proj(x)
        if native.runs(gate, up):
            return self.part.down_proj(_Gated.apply(gate.contiguous(), up.contiguous()))
        return self.part.down_proj(self.part.act_fn(gate) * up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        made = torch.empty_like(gate)
        native.call("gate", gate.dtype, gate, up, made, gate.numel() // gate.shape[-1], gate.shape[-1])
        ctx.save_for_backward(gate, up)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        given = gate, up, gradient.contiguous(), of_gate, of_up
        native.call("gate_backward", gate.dtype, *given, gate.numel() // gate.shape[-1], gate.shape[-1])
        return of_gate, of_up
