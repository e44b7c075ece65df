"""The optimizer under DeepSpeed: each group is clipped by its own norm, and non-finite gradients skip a step."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from align.config.schema import LearnerSettings
from policies.errors import UserError

ADAM_EPSILON = 1e-5
"""As in PPO's reference implementations."""


def make_optimizer(
    settings: LearnerSettings, groups: Mapping[str, list[nn.Parameter]], factors: Mapping[str, float] | None = None
) -> Optimizer:
    """Build the optimizer: AdamW, paged AdamW or SGD over named groups, with learning rates of 0.

    Args:
        settings: The settings of the learner.
        groups: Parameters by name: ROLE, or ROLE.PART.
        factors: Multiplier of each group's learning rate, relative to its role's; 1 where a group has none.

    Raises:
        UserError: There is no GPU for a paged optimizer.
    """
    factors = factors or {}
    named: list[dict[str, Any]] = []
    for name, parameters in groups.items():
        named.append({"params": parameters, "role": name, "factor": factors.get(name, 1.0)})
    if settings.optimizer == "sgd":
        return SGD(named, lr=0.0, weight_decay=settings.weight_decay)
    if settings.optimizer == "paged_adamw":
        return _paged_adamw(named, settings.weight_decay)
    return AdamW(named, lr=0.0, eps=ADAM_EPSILON, weight_decay=settings.weight_decay, fused=True)


def _paged_adamw(named: list[dict[str, Any]], weight_decay: float) -> Optimizer:
    if not torch.cuda.is_available():
        raise UserError(
            "learner.optimizer paged_adamw moves its state between GPU and host memory, and there is no GPU here: "
            "use adamw"
        )
    from bitsandbytes.optim import PagedAdamW32bit

    optimizer: Optimizer = PagedAdamW32bit(named, lr=0.0, eps=ADAM_EPSILON, weight_decay=weight_decay)
    return optimizer


class GroupClip:
    """Clips the gradient of each parameter group by its own norm, just before the optimizer's step.

    It sees what the optimizer sees: complete gradients at ZeRO stage 0, this rank's flat partition at stages 1 to 3,
    where DeepSpeed steps one group at a time. Norms are of the complete gradient, over all ranks.

    Attributes:
        norms: Gradient norms at the last step, by the name of the group.
        skipped: Number of steps with a non-finite gradient, which change nothing.
    """

    def __init__(self, max_norm: float, partitioned: bool) -> None:
        """Set the limit.

        Args:
            max_norm: Largest gradient norm of a group.
            partitioned: Whether each rank sees only a part of the gradient.
        """
        self.max_norm = max_norm
        self.partitioned = partitioned
        self.norms: dict[str, float] = {}
        self.skipped = 0

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        """Clip the gradients; registered as a hook before the optimizer's step."""
        gradients = _gradients_by_group(optimizer)
        norms = {name: self._norm(tensors) for name, tensors in gradients.items()}
        self.norms |= {name: float(norm) for name, norm in norms.items()}
        if not all(torch.isfinite(norm) for norm in norms.values()):
            self.skipped += 1
            optimizer.zero_grad()  # sets the gradients to None, which the optimizer skips
            return
        for name, norm in norms.items():
            scale = min(1.0, self.max_norm / (float(norm) + 1e-6))
            if scale < 1.0:
                torch._foreach_mul_(gradients[name], scale)

    def _norm(self, tensors: list[Tensor]) -> Tensor:
        # In float32, the sum over one flat partition and that over many parameters would differ in the fifth digit.
        square = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)).square().sum()
        if self.partitioned:
            dist.all_reduce(square)
        return square.sqrt()


def _gradients_by_group(optimizer: Optimizer) -> dict[str, list[Tensor]]:
    """The gradients of each group, by its name, without groups that have none."""
    gradients = {}
    for group in optimizer.param_groups:
        tensors = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        if tensors:
            gradients[group["role"]] = tensors
    return gradients
