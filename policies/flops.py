"""Counts the floating-point operations of training, and looks up what a GPU can do."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from policies.module_names import blocks, linears_in
from policies.trunk import Trunk

TERA = 1e12
LAYER_NUMBER = re.compile(r"\.(\d+)\.")
"""The number of a decoder layer in the name of one of its parameters."""


@dataclass(frozen=True)
class Peak:
    """The peak of a GPU for dense matrix products, as its manufacturer states it, in 10¹² operations per second.

    Attributes:
        half: In bfloat16; of a GPU without it, in float16.
        tf32: Of float32 in TF32.
        float32: Of float32 as it is.
    """

    half: float
    tf32: float
    float32: float


PEAKS = {
    "B200": Peak(2250, 1100, 75),
    "H200": Peak(989, 494, 67),
    "H100 PCIe": Peak(756, 378, 51),
    "H100 NVL": Peak(835, 417, 60),
    "H100": Peak(989, 494, 67),
    "A100": Peak(312, 156, 19.5),
    "A10G": Peak(70, 35, 35),
    "L40S": Peak(362, 183, 91.6),
    "L4": Peak(121, 60, 30.3),
    "RTX 4090": Peak(165.2, 82.6, 82.6),
    "RTX 3090": Peak(71, 35.6, 35.6),
    "RTX A6000": Peak(154.8, 77.4, 38.7),
    "V100": Peak(125, 15.7, 15.7),
    "T4": Peak(65, 8.1, 8.1),
}
"""Peaks by a part of the name that torch gives to a GPU; the first that fits counts. From NVIDIA's data sheets."""


def peak_flops(name: str, dtype: torch.dtype, tf32: bool) -> float | None:
    """The peak of a GPU, in operations per second; None where it is not known.

    Args:
        name: The name that torch gives to it.
        dtype: The dtype of the weights.
        tf32: Whether float32 is multiplied in TF32.
    """
    for part, peak in PEAKS.items():
        if re.search(rf"\b{part}\b", name):
            full = peak.tf32 if tf32 else peak.float32
            return (full if dtype == torch.float32 else peak.half) * TERA
    return None


@dataclass(frozen=True)
class TrainingFlops:
    """Operations of a forward and a backward pass.

    Attributes:
        per_token: Those of the weights, by token.
        per_pair: Those of attention, by pair of tokens of which one attends to the other, T²/2 in a sequence of T.
    """

    per_token: int
    per_pair: int

    def total(self, lengths: Iterable[int]) -> float:
        """The operations for sequences of these lengths, in tokens."""
        return float(sum(self.per_token * length + self.per_pair * length**2 / 2 for length in lengths))


def training_flops(trunk: Trunk, role: str) -> TrainingFlops | None:
    """Count the operations that training a role's adapter takes (Chowdhery et al. 2022, PaLM, appendix B).

    A weight takes two operations per token in the forward pass; two in the backward pass for the gradient of its
    input, from the first layer that is trained; and two for its own gradient, if it is trained. The forward pass of an
    adapter does not count, nor what gradient checkpointing computes again.

    Args:
        trunk: The base model with the adapter.
        role: The role that is trained.

    Returns:
        The operations; None for a mixture of experts, of whose weights a token uses some.
    """
    config = trunk.causal.config
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    if any("expert" in name for name, _ in base.named_modules()):
        return None
    layers = [product_weights(layer) for layer in blocks(base)]
    head = config.get_text_config().vocab_size * trunk.width
    adapter = trunk.adapter(role)
    first = first_trained_layer(adapter, len(layers))
    forward = sum(layers) + head
    backward = sum(layers[first:]) + head
    trained = sum(parameter.numel() for parameter in adapter.values())
    attention = 4 * attention_width(config.get_text_config())  # queries by keys, and weights by values
    return TrainingFlops(
        per_token=2 * (forward + backward + trained), per_pair=attention * (3 * len(layers) - 2 * first)
    )


@dataclass(frozen=True)
class Utilization:
    """Tells the model FLOPs utilization (MFU) of GPUs that train.

    Attributes:
        work: What a sequence takes, of each role that is trained.
        peak: The peak of all GPUs together, in operations per second.
    """

    work: Sequence[TrainingFlops]
    peak: float

    def seconds(self, lengths: Sequence[int]) -> float:
        """The seconds that training once on sequences of these lengths, in tokens, takes at the peak."""
        return sum(flops.total(lengths) for flops in self.work) / self.peak


def product_weights(layer: nn.Module) -> int:
    """Number of weights in the matrix products of a layer."""
    return sum(linear.weight.numel() for linear in linears_in(layer))


def attention_width(config: PretrainedConfig) -> int:
    """Width of all heads of attention together."""
    heads: int = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def first_trained_layer(names: Iterable[str], layers: int) -> int:
    """The first decoder layer that a gradient has to reach; `layers`, their number, where it reaches the head alone.

    Args:
        names: Names of the trained parameters, with the number of their layer in those of a layer.
        layers: Number of decoder layers.
    """
    first = layers
    for name in names:
        if found := LAYER_NUMBER.search(name):
            first = min(first, int(found[1]))
        elif "embed" in name:
            return 0
    return first
