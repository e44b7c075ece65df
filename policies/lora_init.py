"""Initial LoRA matrices other than zero: PiSSA and LoftQ, on a base model that stays unchanged for other roles."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

from policies.files.complete_weights import load_complete
from policies.files.quantization import dequantise


@torch.no_grad()
def write_pissa(layers: Iterable[LoraLayer], roles: Sequence[str], rank: int) -> None:
    """Initialise roles by PiSSA (Meng et al. 2024): from the `rank` principal directions of the base's weights.

    PiSSA subtracts these directions from the base. Here the base is shared and stays as it is: the matrices have rank
    2 · rank, and their second half subtracts what their first half adds, so that the adapter changes nothing at first.

    Args:
        layers: The adapted layers.
        roles: The roles to initialise.
        rank: The number of principal directions, half the rank of the layers' matrices.
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
    """Initialise roles by LoftQ (Li et al. 2023, algorithm 1 with T = 1).

    The adapter starts as the best low-rank approximation of the error that quantisation makes in the base's weights.

    Args:
        layers: The adapted layers by name in the base.
        roles: The roles to initialise.
        rank: The rank of the approximation.
        base: Folder or hub name of the base model, which is loaded once more, unquantised.
    """
    unquantised = load_complete(AutoModelForCausalLM, base, torch.device("cpu"), dtype=torch.float32)
    for name, layer in layers.items():
        quantised = dequantise(layer.get_base_layer()).float().cpu()  # [out, in]
        error = unquantised.get_submodule(name).weight - quantised
        down, up = principal(error, rank, layer.scaling[roles[0]])
        _write(layer, roles, down, up)


def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Factor the part of a weight with the largest singular values into LoRA's matrices (PiSSA, eq. 2 and 3).

    Args:
        weight: `[out, in]`, float32.
        rank: The number of singular values to keep.
        scale: The factor by which LoRA multiplies the product of its matrices.

    Returns:
        down `[rank, in]` and up `[out, rank]`; scale · up · down is the best approximation of this rank.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scale).sqrt()  # [rank]
    down = root.unsqueeze(1) * right[:rank]  # [rank, in]
    up = left[:, :rank] * root  # [out, rank]
    return down, up


def hold_principal(layers: Iterable[LoraLayer], rank: int) -> None:
    """Keep the second half of PiSSA's matrices, which subtracts the initial directions, fixed: its gradient is zero."""

    def mask_down(gradient: Tensor) -> Tensor:
        return torch.cat([gradient[:rank], torch.zeros_like(gradient[rank:])])  # [2 · rank, in]

    def mask_up(gradient: Tensor) -> Tensor:
        return mask_down(gradient.T).T  # [out, 2 · rank]

    for layer in layers:
        for role in layer.lora_A:
            layer.lora_A[role].weight.requires_grad_().register_hook(mask_down)
            layer.lora_B[role].weight.requires_grad_().register_hook(mask_up)


def _write(layer: LoraLayer, roles: Sequence[str], down: Tensor, up: Tensor) -> None:
    for role in roles:
        layer.lora_A[role].weight.copy_(down)
        layer.lora_B[role].weight.copy_(up)
