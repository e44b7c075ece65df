"""Starts of LoRA other than zero, on a base that stays as it is for the other roles."""

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

    PiSSA takes their part off the base. Here the base is not touched: the second half of the matrices, of rank
    2 · rank, takes it off. The adapter as a whole changes nothing at first.
    """
    for layer in layers:
        weight = layer.get_base_layer().weight
        down, up = principal((weight.T if layer.fan_in_fan_out else weight).float(), rank, layer.scaling[roles[0]])
        _write(layer, roles, torch.cat([down, down]), torch.cat([up, -up], dim=1))


@torch.no_grad()
def write_loftq(layers: Mapping[str, LoraLayer], roles: Sequence[str], rank: int, base: str) -> None:
    """Start these roles as LoftQ (Li et al. 2023, algorithm 1 with T = 1): the best low-rank part of what the base's
    weights lose by quantisation. base: folder or hub name of the model, which is read once more, unquantised.
    """
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **SAFE)
    for name, layer in layers.items():
        lost = whole.get_submodule(name).weight - dequantise(layer.get_base_layer()).float().cpu()
        _write(layer, roles, *principal(lost, rank, layer.scaling[roles[0]]))


def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Factors `[rank, in]`, `[out, rank]` of the part of a weight `[out, in]` that has its largest singular values.

    scale · up · down is that part (PiSSA, eq. 2 and 3).
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return root.unsqueeze(1) * right[:rank], left[:, :rank] * root


def hold_principal(layers: Iterable[LoraLayer], rank: int) -> None:
    """Give no gradient to the second half of PiSSA's matrices: it stays as it starts."""

    def first_rows(gradient: Tensor) -> Tensor:
        return torch.cat([gradient[:rank], torch.zeros_like(gradient[rank:])])

    for layer in layers:
        for role in layer.lora_A:
            down, up = layer.lora_A[role].weight, layer.lora_B[role].weight
            down.requires_grad_().register_hook(first_rows)
            up.requires_grad_().register_hook(lambda gradient: first_rows(gradient.T).T)


def _write(layer: LoraLayer, roles: Sequence[str], down: Tensor, up: Tensor) -> None:
    for role in roles:
        layer.lora_A[role].weight.copy_(down)
        layer.lora_B[role].weight.copy_(up)
