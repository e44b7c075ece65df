"""The forward pass of a linear layer with LoRA, in as few passes over memory as it needs."""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from policies.layers.replacement import ForwardReplacement

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers that the families of transformers call with the same input, one right after the other."""

FrozenLayer = tuple[Tensor, Tensor | None]
"""Weight `[out, in]` and bias `[out]`, if it has one, of a linear layer without gradients."""


def rate_factor(name: str, ratio: float | None) -> float:
    """The factor on the learning rate of a parameter.

    Args:
        name: Its name in the adapter's file.
        ratio: LoRA+'s ratio of the rate of B to the rate of A (Hayou et al. 2024); None: 1.
    """
    return ratio if ratio and ".lora_B." in name else 1.0


class LoraForward(ForwardReplacement):
    """Replaces PEFT's forward pass of one layer: the same numbers, up to rounding.

    PEFT casts activations to the adapter's dtype and back, and adds the adapter's output in extra passes over memory.
    Here the adapter is cast instead, and its output is added while the base's is written. The first of several layers
    with the same input computes the outputs of all, and the others return what it has computed. For roles that are
    merged, `merged` holds the base's weight with the adapter merged into it.
    """

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whether the layer is plain LoRA on a plain linear layer; any other is left to PEFT."""
        return type(layer) is lora.Linear and type(layer.base_layer) is nn.Linear and not layer.lora_variant

    def __init__(self, layer: lora.Linear) -> None:
        super().__init__(layer)
        self.later_siblings: Sequence[LoraForward] = ()
        """The other layers whose outputs this one computes."""
        self.merged: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        """By role, the buffer to which `merge` writes the weight."""
        self._precomputed: tuple[Tensor, str, Tensor] | None = None
        """What the first sibling computed for this layer: input, role, output."""

    @property
    def base(self) -> nn.Linear:
        """The linear layer of the base model."""
        base: nn.Linear = self.module.base_layer
        return base

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        layer = self.module
        base = layer.base_layer
        if layer._disable_adapters:
            return linear(x, base.weight, base.bias)
        role = layer._active_adapter[0]
        if role in self.merged:
            return linear(x, self.merged[role], base.bias)
        dropout = layer.lora_dropout[role]
        if dropout.training and getattr(dropout, "p", 0.0) > 0:
            return lora.Linear.forward(layer, x)
        precomputed = self._precomputed
        self._precomputed = None
        if precomputed is not None and precomputed[0] is x and precomputed[1] == role:
            return precomputed[2]
        out, *others = self._forward_all(x, role)
        for sibling, sibling_out in zip(self.later_siblings, others, strict=True):
            sibling._precomputed = x, role, sibling_out
        return out

    def _forward_all(self, x: Tensor, role: str) -> tuple[Tensor, ...]:
        """Outputs of this layer and its siblings."""
        bases: list[FrozenLayer] = []
        adapters: list[Tensor] = []
        widest = 0
        for sibling in (self, *self.later_siblings):
            layer = sibling.module
            weight = layer.base_layer.weight
            bases.append((weight, layer.base_layer.bias))
            adapters += [layer.lora_A[role].weight, layer.lora_B[role].weight]
            widest = max(widest, *weight.shape)
        # With few tokens, adding the adapters to the weights costs more than their products with the activations.
        # While gradients flow, the number of tokens must not matter: the result would depend on the microbatches.
        many_tokens = torch.is_grad_enabled() or x.numel() > x.shape[-1] * widest
        into_weights = many_tokens and x.dtype == torch.float32
        outs: tuple[Tensor, ...] = _LoraLinear.apply(x, bases, self.module.scaling[role], into_weights, *adapters)
        return outs

    @torch.no_grad()
    def merge(self, role: str) -> None:
        """Merge a role's adapter into a copy of the weight, computed in float32 and kept in the base's dtype.

        It replaces the role's previous copy in place, because the rounding of a matrix product may depend on the
        address of its weight.
        """
        layer = self.module
        weight = self.base.weight  # [out, in]
        down = layer.lora_A[role].weight.float()  # [rank, in]
        up = layer.lora_B[role].weight.float()  # [out, rank]
        merged = torch.addmm(weight.float(), up, down, alpha=layer.scaling[role])  # [out, in]
        if role not in self.buffers:
            self.buffers[role] = torch.empty_like(weight)
        self.merged[role] = self.buffers[role].copy_(merged)


def join_siblings(base: nn.Module) -> None:
    """Let the adapted layers with the same input be computed together."""
    for module in base.modules():
        for names in SIBLINGS:
            forwards = [getattr(getattr(module, name, None), "forward", None) for name in names]
            adapted = [forward for forward in forwards if isinstance(forward, LoraForward)]
            if adapted:
                first, *later = adapted
                first.later_siblings = later


class _LoraLinear(torch.autograd.Function):
    """x Wᵀ + bias + s · (x Aᵀ) Bᵀ for each of several frozen W, in the dtype of x.

    scale: s, the same for all layers of a role. adapters: A `[rank, in]` and B `[out, rank]`, alternating. x is
    multiplied by the A of all layers at once.
    into_weights: add s · B A to each weight, instead of its product with x to the output. Only in float32: in a coarser
    dtype the sum would round away what the adapter has learned.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bases: Sequence[FrozenLayer], scale: float, into_weights: bool, *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])  # [N, in]
        down = (torch.cat(adapters[::2]) * scale).to(x.dtype)  # [sum of ranks, in]
        ups = [up.to(x.dtype) for up in adapters[1::2]]  # [out, rank] each
        ctx.bases = bases
        ctx.scale = scale
        ctx.into_weights = into_weights
        ctx.ranks = [up.shape[1] for up in ups]
        ctx.dtype = adapters[0].dtype
        outs: list[Tensor] = []  # [N, out] each
        low_rank = None
        if into_weights:
            weights = _adapted_weights(bases, ups, down.split(ctx.ranks))
            for weight, (_, bias) in zip(weights, bases, strict=True):
                outs.append(linear(flat, weight, bias))
        else:
            low_rank = flat @ down.T  # [N, sum of ranks]
            for (weight, bias), up, part in zip(bases, ups, low_rank.split(ctx.ranks, dim=1), strict=True):
                outs.append(linear(flat, weight, bias).addmm_(part, up.T))
        ctx.save_for_backward(flat, down, low_rank, *ups)
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)  # [..., out] each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *out_gradients: Tensor) -> tuple[Any, ...]:
        flat, down, low_rank, *ups = ctx.saved_tensors
        outer = [gradient.reshape(len(flat), -1) for gradient in out_gradients]  # [N, out] each
        inner = torch.cat([gradient @ up for gradient, up in zip(outer, ups, strict=True)], dim=1)  # [N, sum of ranks]
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = _input_gradient(ctx, outer, inner, down, ups).view(*out_gradients[0].shape[:-1], -1)
        adapter_gradients: list[Tensor | None] = [None] * (2 * len(ups))
        if any(ctx.needs_input_grad[4:]):
            low_rank = flat @ down.T if low_rank is None else low_rank  # [N, sum of ranks]
            down_gradients = (inner.T @ flat).to(ctx.dtype).mul_(ctx.scale).split(ctx.ranks)  # [rank, in] each
            for index, part in enumerate(low_rank.split(ctx.ranks, dim=1)):
                adapter_gradients[2 * index] = down_gradients[index]
                up_gradient = (part.T @ outer[index]).T  # [out, rank]
                # In the layout of its parameter; otherwise it would be copied where gradients are accumulated.
                up_gradient = up_gradient.to(ctx.dtype, memory_format=torch.contiguous_format)
                adapter_gradients[2 * index + 1] = up_gradient
        return x_gradient, None, None, None, *adapter_gradients


def _input_gradient(ctx: Any, outer: Sequence[Tensor], inner: Tensor, down: Tensor, ups: Sequence[Tensor]) -> Tensor:
    """The gradient of x, `[N, in]`, summed over the layers."""
    if ctx.into_weights:
        weights = _adapted_weights(ctx.bases, ups, down.split(ctx.ranks))
    else:
        weights = [weight for weight, _ in ctx.bases]
    gradient = outer[0] @ weights[0]  # [N, in]
    for out_gradient, weight in zip(outer[1:], weights[1:], strict=True):
        gradient.addmm_(out_gradient, weight)
    if not ctx.into_weights:
        gradient.addmm_(inner, down)
    return gradient


def _adapted_weights(bases: Sequence[FrozenLayer], ups: Sequence[Tensor], downs: Sequence[Tensor]) -> list[Tensor]:
    """W + s · B A of each layer, `[out, in]`; `downs` are already multiplied by s."""
    return [torch.addmm(weight, up, down) for (weight, _), up, down in zip(bases, ups, downs, strict=True)]
