"""The forward pass of a linear layer with LoRA, in as few passes over memory as it needs."""

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def by_rate(named: Iterable[tuple[str, nn.Parameter]], ratio: float | None) -> list[tuple[float, list[nn.Parameter]]]:
    """Parameters in groups, each with what its learning rate is multiplied by.

    ratio: LoRA+'s (Hayou et al. 2024), of the rate of B to that of A; None: one group, as it comes.
    """
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in named:
        groups.setdefault(ratio if ratio and ".lora_B." in name else 1.0, []).append(parameter)
    return list(groups.items())


class AdaptedLinear:
    """Takes the place of PEFT's forward for one layer: the same numbers, up to rounding.

    PEFT moves activations to the adapter's dtype and back and adds the adapter's part in passes of its own; here the
    adapter comes to the activations, and its part is added where the base's product is written.
    `merged` holds, for roles that are merged, the base's weight with the adapter in it.
    """

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whether the layer is plain LoRA on a plain linear layer; any other is left to PEFT."""
        return type(layer) is lora.Linear and type(layer.base_layer) is nn.Linear and not layer.lora_variant

    def __init__(self, layer: lora.Linear) -> None:
        self.layer, self.base = layer, layer.base_layer
        self.merged: dict[str, Tensor] = {}
        self.rooms: dict[str, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        layer, base = self.layer, self.base
        if layer._disable_adapters:
            return linear(x, base.weight, base.bias)
        role = layer._active_adapter[0]
        if role in self.merged:
            return linear(x, self.merged[role], base.bias)
        dropout = layer.lora_dropout[role]
        if dropout.training and getattr(dropout, "p", 0.0) > 0:
            return lora.Linear.forward(layer, x)
        down, up = layer.lora_A[role].weight, layer.lora_B[role].weight
        # While gradients flow, whatever the number of rows, lest the cut into passes shows in them.
        many = torch.is_grad_enabled() or x.numel() > x.shape[-1] * max(base.weight.shape)
        summed = many and x.dtype == torch.float32
        return _LoraLinear.apply(x, base.weight, base.bias, down, up, layer.scaling[role], summed)

    @torch.no_grad()
    def merge(self, role: str) -> None:
        """Compute the weight of a role with its adapter in it, in float32, and keep it in the base's dtype.

        It is written into the role's room, where the last one was: how a product rounds may depend on where its weight
        lies.
        """
        layer, weight = self.layer, self.base.weight
        down, up = layer.lora_A[role].weight.float(), layer.lora_B[role].weight.float()
        merged = torch.addmm(weight.float(), up, down, alpha=layer.scaling[role])
        if role not in self.rooms:
            self.rooms[role] = torch.empty_like(weight)
        self.merged[role] = self.rooms[role].copy_(merged)


class _LoraLinear(torch.autograd.Function):
    """x Wᵀ + bias + s · (x Aᵀ) Bᵀ for a frozen W, in the dtype of x.

    summed: W + s · B A is made anew in each direction, which with many rows is less work than to add the adapter's part
    to each. In float32 alone: a coarser sum would lose what the adapter has learned.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, summed: bool
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        a, b = down.to(x.dtype), up.to(x.dtype)
        narrow = None
        if summed:
            out = linear(flat, torch.addmm(weight, b, a, alpha=scale), bias)
        else:
            narrow = flat @ a.T
            out = linear(flat, weight, bias).addmm_(narrow, b.T, alpha=scale)
        ctx.save_for_backward(flat, weight, a, b, narrow)
        ctx.scale, ctx.summed, ctx.dtype = scale, summed, down.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, narrow = ctx.saved_tensors
        outer = gradient.reshape(-1, gradient.shape[-1])
        back = outer @ b
        of_x = of_down = of_up = None
        if ctx.needs_input_grad[0]:
            if ctx.summed:
                of_x = outer @ torch.addmm(weight, b, a, alpha=ctx.scale)
            else:
                of_x = (outer @ weight).addmm_(back, a, alpha=ctx.scale)
            of_x = of_x.view(*gradient.shape[:-1], -1)
        if ctx.needs_input_grad[3]:
            of_down = (back.T @ flat).mul_(ctx.scale).to(ctx.dtype)
        if ctx.needs_input_grad[4]:
            narrow = flat @ a.T if narrow is None else narrow
            of_up = (narrow.T @ outer).T.mul(ctx.scale).to(ctx.dtype)
        return of_x, None, None, of_down, of_up, None, None
