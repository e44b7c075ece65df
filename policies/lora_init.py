"""Starts of LoRA other than zero, PiSSA and LoftQ, on a base that stays as it is for the other roles."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

from policies.files.quantization import dequantise
from policies.files.safe_reading import SAFE


@torch.no_grad()
def write_pissa(layers: Iterable[LoraLayer], roles: Sequence[str], rank: int) -> None:
    """Start these roles as PiSSA (Meng et al. 2024): the first `rank` directions are the base's principal ones.

    PiSSA subtracts their part from the base. Here the base is not touched: the second half of the matrices, of rank
    2 · rank, subtracts it. The adapter as a whole changes nothing at first.
    """
    for layer in layers:
        weight = layer.get_base_layer().weight
        if layer.fan_in_fan_out:
            weight = weight.T  # [out, in]
        down, up = principal(weight.float(), rank, layer.scaling[roles[0]])
        down = torch.cat([down, down])  # [2 · rank, in]
        up = torch.cat([up, -up], dim=1)  # [out, 2 · rank]
        _write(layer, roles, down, up)


@torch.no_grad()
def write_loftq(layers: Mapping[str, LoraLayer], roles: Sequence[str], rank: int, base: str) -> None:
    """Start these roles as LoftQ (Li et al. 2023, algorithm 1 with T = 1).

    It is the best low-rank approximation of what the base's weights lose by quantisation.

    Args:
        layers: the adapted layers by name in the base.
        roles: those that start so.
        rank: of the approximation.
        base: folder or hub name of the model, which is read once more, unquantised.
    """
    unquantised = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **SAFE)
    for name, layer in layers.items():
        quantised = dequantise(layer.get_base_layer()).float().cpu()  # [out, in]
        error = unquantised.get_submodule(name).weight - quantised
        down, up = principal(error, rank, layer.scaling[roles[0]])
        _write(layer, roles, down, up)


def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """The part of a weight that has its largest singular values, as the factors of LoRA (PiSSA, eq. 2 and 3).

    Args:
        weight: `[out, in]`, float32.
        rank: how many singular values.
        scale: what LoRA multiplies the product of its matrices by.

    Returns:
        down `[rank, in]` and up `[out, rank]`; scale · up · down is the part.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scale).sqrt()  # [rank]
    down = root.unsqueeze(1) * right[:rank]  # [rank, in]
    up = left[:, :rank] * root  # [out, rank]
    return down, up


def hold_principal(layers: Iterable[LoraLayer], rank: int) -> None:
    """Give no gradient to the second half of PiSSA's matrices: it stays as it starts."""

    def of_down(gradient: Tensor) -> Tensor:
        return torch.cat([gradient[:rank], torch.zeros_like(gradient[rank:])])  # [2 · rank, in]

    def of_up(gradient: Tensor) -> Tensor:
        return of_down(gradient.T).T  # [out, 2 · rank]

    for layer in layers:
        for role in layer.lora_A:
            layer.lora_A[role].weight.requires_grad_().register_hook(of_down)
            layer.lora_B[role].weight.requires_grad_().register_hook(of_up)


def _write(layer: LoraLayer, roles: Sequence[str], down: Tensor, up: Tensor) -> None:
    for role in roles:
        layer.lora_A[role].weight.copy_(down)
        layer.lora_B[role].weight.copy_(up)
