"""Policies on the line through a reference and a trained policy: reference + a · (policy - reference).

a scales how far training has moved the weights: 0 is the reference, 1 the policy, above 1 is beyond it (Ilharco et al.
2023, "Editing models with task arithmetic"; Liu et al. 2024, "Decoding-time realignment of language models").
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from policies.errors import UserError
from policies.method_spec import supporting
from policies.schema import PolicySettings
from policies.trunk import AdapterWeights

DOWN, UP = "lora_A.", "lora_B."
"""Parts of the names of LoRA's matrices: A maps the input to `rank` numbers, B these to the output."""


@dataclass(frozen=True)
class ScaledAdapter:
    """An adapter, and the settings that describe it: a scaled LoRA may have a larger rank.

    Attributes:
        settings: The `policy` section that it fits.
        weights: Its tensors by name in its file.
    """

    settings: PolicySettings
    weights: AdapterWeights


def scale_adapter(
    settings: PolicySettings, reference: AdapterWeights, policy: AdapterWeights, scale: float
) -> ScaledAdapter:
    """The adapter at reference + a · (policy - reference), exactly.

    Parameters that the weights of the model depend on linearly are interpolated. The product of LoRA's matrices is not
    linear in them: (1 - a) B_ref A_ref + a B A is the product of the joined matrices, of the sum of both ranks. A
    reference whose B is zero, as without SFT, adds nothing, and the rank stays.

    Args:
        settings: The adaptation method of both.
        reference: The reference's adapter.
        policy: The policy's.
        scale: a, any finite number. 0 gives the reference's tensors themselves, 1 the policy's.

    Raises:
        UserError: The method does not allow it, or a is not finite.
    """
    if not math.isfinite(scale):
        raise UserError(f"--scale {scale}: a finite number was expected")
    if not settings.spec.scales.allows(settings):
        raise UserError(
            f"--scale: policy.method {settings.method} with these settings has no policies in between; those that do: "
            f"{supporting('scales')}"
        )
    if scale in (0, 1):
        return ScaledAdapter(settings, policy if scale else reference)
    if not settings.spec.is_low_rank:
        return ScaledAdapter(settings, {name: _between(reference[name], policy[name], scale) for name in policy})
    _check_ranks(settings, policy)
    weights = _joined(reference, policy, scale)
    return ScaledAdapter(with_rank(settings, rank_of(weights)), weights)


def _between(reference: Tensor, policy: Tensor, scale: float) -> Tensor:
    """In float64, rounded once."""
    return (reference.double() + scale * (policy.double() - reference.double())).to(policy.dtype)


def _joined(reference: AdapterWeights, policy: AdapterWeights, scale: float) -> AdapterWeights:
    """A `[2 r, in]` and B `[out, 2 r]` of both adapters; of the policy alone, if the other adds nothing."""
    scaled = {name: weight * scale if UP in name else weight for name, weight in policy.items()}
    if not any(weight.any() for name, weight in reference.items() if UP in name):
        return scaled
    joined: AdapterWeights = {}
    for name, weight in scaled.items():
        if UP in name:
            joined[name] = torch.cat([reference[name] * (1 - scale), weight], dim=1)
        else:
            joined[name] = torch.cat([reference[name], weight], dim=0)
    return joined


def _check_ranks(settings: PolicySettings, weights: AdapterWeights) -> None:
    """Raise UserError where a matrix holds those of several experts, whose ranks cannot be joined."""
    for name, weight in weights.items():
        if DOWN in name and len(weight) != settings.full_rank:
            raise UserError(f"--scale: {name} holds the matrices of several experts, which cannot be scaled")


def rank_of(weights: Mapping[str, Tensor]) -> int:
    """The rank of a LoRA adapter."""
    return next(len(weight) for name, weight in weights.items() if DOWN in name)


def with_rank(settings: PolicySettings, rank: int) -> PolicySettings:
    """The settings of a LoRA adapter of another rank, whose matrices are multiplied by the same factor."""
    exponent = 0.5 if settings.rslora else 1.0
    alpha = settings.full_alpha * (rank / settings.full_rank) ** exponent
    return settings.model_copy(update={"rank": rank, "alpha": alpha, "init": "zero"})


def widened(weights: AdapterWeights, settings: PolicySettings) -> AdapterWeights:
    """The same adapter with the rank of the settings, if it is a LoRA adapter of a lower one: zeros are added.

    Args:
        weights: The adapter's tensors by name in its file.
        settings: Settings by `with_rank` of the adapter's own, or those themselves.
    """
    if not settings.spec.is_low_rank:
        return weights
    added = settings.full_rank - rank_of(weights)
    if not added:
        return weights
    wide: AdapterWeights = {}
    for name, weight in weights.items():
        padding = (0, added) if UP in name else (0, 0, 0, added)  # columns of B `[out, r]`, rows of A `[r, in]`
        wide[name] = torch.nn.functional.pad(weight, padding)
    return wide
