"""The forward pass of a linear layer with LoRA, in as few passes over memory as it needs."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def parameter_groups_by_rate(
    named: Iterable[tuple[str, nn.Parameter]], ratio: float | None
) -> list[tuple[float, list[nn.Parameter]]]:
    """Parameters in groups, each with what its learning rate is multiplied by.

    ratio: LoRA+'s (Hayou et al. 2024), of the rate of B to that of A; None: one group, as it comes.
    """
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in named:
        groups.setdefault(ratio if ratio and ".lora_B." in name else 1.0, []).append(parameter)
    return list(groups.items())


SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear maps that families of transformers give the same input, one right after the other."""


class AdaptedLinear:
    """Takes the place of PEFT's forward for one layer: the same numbers, up to rounding.

    PEFT moves activations to the adapter's dtype and back and adds the adapter's part in passes of its own; here the
    adapter comes to the activations, and its part is added where the base's product is written. The first of several
    maps of one input computes all of them, and the others hand out what it has made.
    `merged` holds, for roles that are merged, the base's weight with the adapter in it.
    """

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whether the layer is plain LoRA on a plain linear layer; any other is left to PEFT."""
        return type(layer) is lora.Linear and type(layer.base_layer) is nn.Linear and not layer.lora_variant

    def __init__(self, layer: lora.Linear) -> None:
        self.layer, self.base = layer, layer.base_layer
        self.together = [self]
        self.merged: dict[str, Tensor] = {}
        self.rooms: dict[str, Tensor] = {}
        self._made: tuple[Tensor, str, Tensor] | None = None
        """What the first of several has made: of which input, under which role, and what."""

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
        made, self._made = self._made, None
        if made is not None and made[0] is x and made[1] == role:
            return made[2]
        out, *others = self._adapted(x, role)
        for sibling, its in zip(self.together[1:], others, strict=True):
            sibling._made = x, role, its
        return out

    def _adapted(self, x: Tensor, role: str) -> tuple[Tensor, ...]:
        layers = [part.layer for part in self.together]
        bases = [(part.base.weight, part.base.bias) for part in self.together]
        adapters = [weights for of in layers for weights in (of.lora_A[role].weight, of.lora_B[role].weight)]
        # While gradients flow, whatever the number of rows, lest the cut into passes shows in them.
        many = torch.is_grad_enabled() or x.numel() > x.shape[-1] * max(max(weight.shape) for weight, *_ in bases)
        summed = many and x.dtype == torch.float32
        outs: tuple[Tensor, ...] = _LoraLinear.apply(x, bases, self.layer.scaling[role], summed, *adapters)
        return outs

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


def join_siblings(base: nn.Module) -> None:
    """Let maps of one input that are all adapted be computed together."""
    for module in base.modules():
        for names in SIBLINGS:
            forwards = (getattr(getattr(module, name, None), "forward", None) for name in names)
            parts = [forward for forward in forwards if isinstance(forward, AdaptedLinear)]
            for part in parts[:1]:
                part.together = parts


class _LoraLinear(torch.autograd.Function):
    """x Wᵀ + bias + s · (x Aᵀ) Bᵀ for each of several frozen W, in the dtype of x.

    bases: W `[out, in]` and bias `[out]` or None of each; scale: s, which a role has once; adapters: A `[rank, in]` and
    B `[out, rank]` of each. The products of the adapters with what their maps share, x and its gradient, are one for
    all.
    summed: W + s · B A is made anew in each direction, which with many rows is less work than to add the adapter's part
    to each. In float32 alone: a coarser sum would lose what the adapter has learned.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bases: Sequence[tuple[Tensor, Tensor | None]],
        scale: float,
        summed: bool,
        *adapters: Tensor,
    ) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        down = (torch.cat(adapters[::2]) * scale).to(x.dtype)
        ups = [up.to(x.dtype) for up in adapters[1::2]]
        ctx.bases, ctx.scale, ctx.summed = bases, scale, summed
        ctx.ranks, ctx.dtype = [up.shape[1] for up in ups], adapters[0].dtype
        narrow = None
        if summed:
            weights = _sums(bases, ups, down.split(ctx.ranks))
            outs = [linear(flat, weight, bias) for weight, (_, bias) in zip(weights, bases, strict=True)]
        else:
            narrow = flat @ down.T
            parts = zip(bases, ups, narrow.split(ctx.ranks, dim=1), strict=True)
            outs = [linear(flat, weight, bias).addmm_(part, up.T) for (weight, bias), up, part in parts]
        ctx.save_for_backward(flat, down, narrow, *ups)
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        flat, down, narrow, *ups = ctx.saved_tensors
        outer = [gradient.reshape(len(flat), -1) for gradient in gradients]
        back = torch.cat([of @ up for of, up in zip(outer, ups, strict=True)], dim=1)
        of_x = None
        if ctx.needs_input_grad[0]:
            weights = _sums(ctx.bases, ups, down.split(ctx.ranks)) if ctx.summed else [base[0] for base in ctx.bases]
            of_x = outer[0] @ weights[0]
            for of, weight in zip(outer[1:], weights[1:], strict=True):
                of_x.addmm_(of, weight)
            if not ctx.summed:
                of_x.addmm_(back, down)
            of_x = of_x.view(*gradients[0].shape[:-1], -1)
        of_adapters: Sequence[Tensor | None] = [None] * 2 * len(ups)
        if any(ctx.needs_input_grad[4:]):
            narrow = flat @ down.T if narrow is None else narrow
            downs = (back.T @ flat).to(ctx.dtype).mul_(ctx.scale).split(ctx.ranks)
            parts = zip(outer, narrow.split(ctx.ranks, dim=1), strict=True)
            # As their parameters lie, lest they are copied once more where they are kept.
            of_ups = [(part.T @ of).T.to(ctx.dtype, memory_format=torch.contiguous_format) for of, part in parts]
            of_adapters = [of for pair in zip(downs, of_ups, strict=True) for of in pair]
        return of_x, None, None, None, *of_adapters


def _sums(
    bases: Sequence[tuple[Tensor, Tensor | None]], ups: Sequence[Tensor], downs: Sequence[Tensor]
) -> list[Tensor]:
    return [torch.addmm(weight, up, down) for (weight, _), up, down in zip(bases, ups, downs, strict=True)]
