"""Rotary positions on the CPU, in one pass over memory."""

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from policies.layers import native

NAME = "apply_rotary_pos_emb"
"""What families of transformers call the function that turns queries and keys."""

CPU = torch.device("cpu")
Rotate = Callable[..., tuple[Tensor, Tensor]]


def use_own_rotation(model: nn.Module) -> None:
    """Let attention layers that turn halves of each head against each other do so by the function below.

    The forward pass stays transformers' own, and so does the function of its module, which other models use: the layer
    gets a copy of the one that finds ours under the name of theirs.
    """
    for layer in model.modules():
        forward = type(layer).forward
        theirs = getattr(forward, "__globals__", {}).get(NAME)
        if theirs is not None and NAME in forward.__code__.co_names and _turns_halves(theirs):
            ours = forward.__globals__ | {NAME: _in_place_of(theirs)}
            code, defaults = forward.__code__, forward.__defaults__
            own = FunctionType(code, ours, forward.__name__, defaults, forward.__closure__)
            own.__kwdefaults__ = forward.__kwdefaults__
            layer.forward = MethodType(own, layer)


def _turns_halves(theirs: Rotate) -> bool:
    """Whether the function is x · cos + (-x₂, x₁) · sin for both halves x₁, x₂ of each head (Su et al. 2021)."""
    generator = torch.Generator().manual_seed(0)
    query, key, (cos, sin) = (torch.randn(n, 2, 3, 8, generator=generator, device=CPU) for n in (1, 1, 2))
    cos, sin = cos[:1], sin[:1]
    try:
        made = theirs(query, key, cos, sin)
    except (TypeError, ValueError, RuntimeError):
        return False
    signed = sin.unsqueeze(1) * torch.tensor([-1, 1], device=CPU).repeat_interleave(4)
    expected = [states * cos.unsqueeze(1) + states.roll(4, -1) * signed for states in (query, key)]
    return all(torch.allclose(*pair, atol=1e-5) for pair in zip(made, expected, strict=True))


def _in_place_of(theirs: Rotate) -> Rotate:
    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *options: Any, **named: Any) -> Any:
        whole = query.shape[-1] == cos.shape[-1]
        if options or named or not whole or not native.runs(query, key, cos, sin):
            return theirs(query, key, cos, sin, *options, **named)
        cos, sin = (angles.expand(len(query), -1, -1).contiguous() for angles in (cos, sin))
        return _Rotation.apply(query, cos, sin), _Rotation.apply(key, cos, sin)

    return rotate


class _Rotation(torch.autograd.Function):
    """`[B, heads, T, D]` by angles whose cosines and sines are `[B, T, D]`."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(states, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, sin, back=True), None, None


def _rotated(states: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    by_token = states.transpose(1, 2).contiguous()  # heads of one token beside each other, as the layer made them
    made = torch.empty_like(by_token)
    batch, tokens, heads, width = by_token.shape
    native.call("rotate", states.dtype, by_token, cos, sin, made, batch * tokens, heads, width, int(back))
    return made.transpose(1, 2)
