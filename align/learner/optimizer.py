"""The optimizer under DeepSpeed: each role is clipped by its own norm, and non-finite gradients skip a step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from align.learner.partitions import gradient_partitions
from align.roles.trained import ParameterGroup, role_of_group
from policies.errors import UserError
from policies.schema import OptimizerSettings


def make_optimizer(settings: OptimizerSettings, groups: Sequence[ParameterGroup]) -> Optimizer:
    """Build the optimizer: AdamW, paged AdamW or SGD, with learning rates of 0.

    Args:
        settings: The settings of the optimizer.
        groups: What it steps.

    Raises:
        UserError: There is no GPU for a paged optimizer.
    """
    named: list[dict[str, Any]] = []
    for group in groups:
        named.append({"params": group.parameters, "role": group.name, "factor": group.factor, **group.options})
    if settings.optimizer == "sgd":
        return SGD(named, lr=0.0, weight_decay=settings.weight_decay)
    if settings.optimizer == "paged_adamw":
        return _paged_adamw(named, settings)
    return AdamW(named, lr=0.0, eps=settings.adam_epsilon, weight_decay=settings.weight_decay, fused=True)


def _paged_adamw(named: list[dict[str, Any]], settings: OptimizerSettings) -> Optimizer:
    if not torch.cuda.is_available():
        raise UserError(
            "`optimizer: paged_adamw` moves its state between GPU and host memory, and there is no GPU here: use adamw"
        )
    from bitsandbytes.optim import PagedAdamW32bit

    optimizer: Optimizer = PagedAdamW32bit(named, lr=0.0, eps=settings.adam_epsilon, weight_decay=settings.weight_decay)
    return optimizer


class RoleClip:
    """Clips the gradient of each role by its norm over all parameter groups of the role, before the optimizer's step.

    All norms are taken before any group is stepped, and a norm that is not finite skips the step of every role.

    Attributes:
        max_norm: Largest gradient norm of a role.
        norms: Gradient norms of the roles at the last step, before clipping, over all ranks.
        skipped: Number of steps that `__call__` skipped.
    """

    def __init__(self, max_norm: float) -> None:
        """Set the largest gradient norm of a role."""
        self.max_norm = max_norm
        self.norms: dict[str, float] = {}
        self.skipped = 0

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        """Clip complete gradients (ZeRO stage 0); registered as a hook before the optimizer's step."""
        gradients = []
        for group in optimizer.param_groups:
            tensors = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            if tensors:
                gradients.append(GroupGradient(group["role"], tensors, _squared_norm(tensors)))
        if not self._clip(gradients):
            self.skipped += 1
            optimizer.zero_grad()  # sets the gradients to None, which the optimizer skips

    def clip_partitions(self, zero: Any) -> None:
        """Clip this rank's partitions of the gradients, which all ranks do together (ZeRO stages 1 to 3).

        Args:
            zero: DeepSpeed's ZeRO optimizer, before its step. It skips the step by itself where a gradient is not
                finite.
        """
        gradients = []
        for group, gradient in zip(zero.optimizer.param_groups, gradient_partitions(zero), strict=True):
            square = _squared_norm([gradient])
            dist.all_reduce(square)
            gradients.append(GroupGradient(group["role"], [gradient], square))
        self._clip(gradients)

    def _clip(self, gradients: Sequence["GroupGradient"]) -> bool:
        """Clip each role's gradients in place, unless one is not finite. Returns whether all are finite."""
        by_role: dict[str, list[GroupGradient]] = {}
        for gradient in gradients:
            by_role.setdefault(role_of_group(gradient.group), []).append(gradient)
        self.norms = {}
        for role, parts in by_role.items():
            self.norms[role] = float(torch.stack([part.squared_norm for part in parts]).sum().sqrt())
        if not all(math.isfinite(norm) for norm in self.norms.values()):
            return False
        for role, parts in by_role.items():
            scale = min(1.0, self.max_norm / (self.norms[role] + 1e-6))
            if scale < 1.0:
                for part in parts:
                    torch._foreach_mul_(part.tensors, scale)
        return True


@dataclass(frozen=True)
class GroupGradient:
    """The gradient of a parameter group.

    Attributes:
        group: Name of the group, ROLE or ROLE.PART.
        tensors: The gradient, or this rank's part of it.
        squared_norm: `[]` float64, of the complete gradient.
    """

    group: str
    tensors: list[Tensor]
    squared_norm: Tensor


def _squared_norm(tensors: list[Tensor]) -> Tensor:
    """Squared norm, `[]` float64: in float32, the same gradient in other parts would differ in the fifth digit."""
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)).square().sum()
