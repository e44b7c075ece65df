"""The optimizer under DeepSpeed: groups clipped each by its own norm, and steps that non-finite gradients skip."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from align.config.schema import LearnerSettings
from policies.errors import UserError


def make_optimizer(
    settings: LearnerSettings, groups: Mapping[str, list[nn.Parameter]], factors: Mapping[str, float] | None = None
) -> Optimizer:
    """AdamW (ε 1e-5, as PPO's reference implementations have it), paged or not, or SGD over named groups.

    groups: parameters by the role that they are of, or ROLE.PART. factors: what a group's learning rate is a multiple
    of its role's by, where it is not the same. Raises UserError where there is nothing to page.
    """
    factors = factors or {}
    named: list[dict[str, Any]] = [
        {"params": parameters, "role": name, "factor": factors.get(name, 1.0)} for name, parameters in groups.items()
    ]
    if settings.optimizer == "sgd":
        return SGD(named, lr=0.0, weight_decay=settings.weight_decay)
    if settings.optimizer == "paged_adamw":
        return _paged(named, settings.weight_decay)
    return AdamW(named, lr=0.0, eps=1e-5, weight_decay=settings.weight_decay, fused=True)


def _paged(named: list[dict[str, Any]], weight_decay: float) -> Optimizer:
    if not torch.cuda.is_available():
        raise UserError(
            "learner.optimizer paged_adamw moves its state between the memories of a GPU and its host, "
            "and there is no GPU here: use adamw"
        )
    from bitsandbytes.optim import PagedAdamW32bit

    return PagedAdamW32bit(named, lr=0.0, eps=1e-5, weight_decay=weight_decay)


class GroupClip:
    """Clips the gradient of each parameter group by its own norm, just before the optimizer's step.

    It sees what the optimizer sees: whole gradients at ZeRO stage 0, this rank's flat partition at stages 1 to 3, where
    DeepSpeed steps one group at a time. Norms are of the whole gradient, over all ranks. `norms` holds those of the
    last step by the group's role; `skipped` counts steps whose gradient was not finite, which change nothing.
    """

    def __init__(self, limit: float, partitioned: bool) -> None:
        self.limit = limit
        self.partitioned = partitioned
        self.norms: dict[str, float] = {}
        self.skipped = 0

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        gradients = {g["role"]: [p.grad for p in g["params"] if p.grad is not None] for g in optimizer.param_groups}
        norms = {role: self._norm(tensors) for role, tensors in gradients.items() if tensors}
        self.norms |= {role: float(norm) for role, norm in norms.items()}
        if not all(torch.isfinite(norm) for norm in norms.values()):
            self.skipped += 1
            for parameter in _parameters(optimizer):
                parameter.grad = None
            return
        for role, norm in norms.items():
            scale = min(1.0, self.limit / (float(norm) + 1e-6))
            if scale < 1.0:
                torch._foreach_mul_(gradients[role], scale)

    def _norm(self, tensors: list[Tensor]) -> Tensor:
        # In float64, or the sum over one flat partition and that over many parameters would differ in the fifth digit.
        square = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)).square().sum()
        if self.partitioned:
            dist.all_reduce(square)
        return square.sqrt()


def _parameters(optimizer: Optimizer) -> Iterable[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
