"""The losses of PPO per token. The learner sums and averages them.

Shapes: P response tokens of a microbatch.
"""

import math
import pkgutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align.algorithms.descriptions import describe
from align.config.estimators import POLICY_LOSSES, Function, call_user_function, user_function
from align.config.ppo_settings import PpoSettings
from policies.errors import UserError

PolicyLoss = Callable[[Tensor, Tensor, Tensor, PpoSettings], tuple[Tensor, Tensor]]
"""A policy loss takes, in this order, the log-probabilities of the response tokens under the current policy, those
under the policy that scored the episodes, the advantages, all `[P]` float32, and the settings of PPO. It returns the
loss of each token and whether a clip is active there (float 0 or 1, only logged), both `[P]`."""


def load_policy_loss(name: str) -> PolicyLoss:
    """The function of a built-in policy loss, or of a user's, which then raises UserError where it fails.

    Raises:
        UserError: There is no such function.
    """
    if name not in POLICY_LOSSES:
        return partial(_users_policy_loss, user_function(name, "ppo.policy_loss"), name)
    function: PolicyLoss = pkgutil.resolve_name(POLICY_LOSSES[name])
    return function


def _users_policy_loss(
    function: Function, name: str, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, ppo: PpoSettings
) -> tuple[Tensor, Tensor]:
    """Call a user's policy loss, and check the types and shapes of its result, which does not wait for the GPU."""
    result = call_user_function(function, name, "ppo.policy_loss", logprobs, old_logprobs, advantages, ppo)
    is_pair = isinstance(result, tuple | list) and len(result) == 2
    if not is_pair or not all(_fits(tensor, logprobs) for tensor in result) or not result[0].is_floating_point():
        raise UserError(
            f"ppo.policy_loss: {name} returned {describe(result)}; expected (loss, clipped), both [P] float32 on the "
            f"device of the log-probabilities, here {describe(logprobs.detach())}"
        )
    loss, clipped = result
    return loss, clipped


def _fits(tensor: Any, logprobs: Tensor) -> bool:
    """Whether a result has the shape and device of the log-probabilities, and combines with them to their type."""
    if not isinstance(tensor, Tensor) or tensor.shape != logprobs.shape or tensor.device != logprobs.device:
        return False
    return torch.promote_types(tensor.dtype, logprobs.dtype) == logprobs.dtype


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, ppo: PpoSettings
) -> tuple[Tensor, Tensor]:
    """The policy loss `clip`: see `clipped_policy_loss` and `PolicyLoss`."""
    return clipped_policy_loss(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        low=ppo.clip_low,
        high=ppo.clip_high,
        dual=ppo.dual_clip or math.inf,
    )


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float, dual: float = math.inf
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of PPO, with dual clip.

    max(-A·ρ, -A·clip(ρ, 1 - low, 1 + high)) with ρ = π/π_old                 Schulman et al. 2017, eq. 7
    and, where A < 0, at most -A·dual, so that a large ratio cannot run away   Ye et al. 2020, eq. 5

    Args:
        logprobs: `[P]`, log-probabilities of the response tokens under the current policy, in nats.
        old_logprobs: `[P]`, the same under the policy that the episodes were scored with.
        advantages: `[P]`.
        low: The ratio is clipped at 1 - low.
        high: The ratio is clipped at 1 + high.
        dual: Bound on the ratio where the advantage is negative.

    Returns:
        The loss of each token, and whether a clip is active there (float 0 or 1), both `[P]`.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -advantages * ratio
    pessimistic = torch.maximum(unclipped, -advantages * ratio.clamp(1 - low, 1 + high))
    loss = torch.where((advantages < 0) & (ratio > dual), -advantages * dual, pessimistic)
    return loss, (loss != unclipped).float()


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """The value loss with a clipped change, as in PPO's reference implementations.

    ½·max((V - R)², (clip(V, V_old ± clip) - R)²); without `clip`, ½·(V - R)².

    Args:
        values: `[P]`, values of the current critic.
        old_values: `[P]`, values of the critic that the episodes were scored with.
        returns: `[P]`, the targets.
        clip: Largest change of a value from the old one; None: no clipping.

    Returns:
        The loss of each token, and whether the clip is active there (float 0 or 1), both `[P]`.
    """
    unclipped = (values - returns).square()
    if clip is None:
        return unclipped / 2, torch.zeros_like(unclipped)
    clipped = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return torch.maximum(unclipped, clipped) / 2, (clipped > unclipped).float()
