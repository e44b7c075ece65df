"""Advantage estimators: from the token rewards of a whole batch to advantages and returns.

All have the same signature, users' own included. `align.config.estimators` lists them with what each one needs.
"""

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align.algorithms.advantages import batch_gae, discounted_sums, grpo, rloo
from align.algorithms.descriptions import describe
from align.config.estimators import ESTIMATORS, Function, call_user_function, find_estimator, user_function
from policies.errors import UserError


@dataclass(frozen=True)
class EstimatorInput:
    """The input of an advantage estimator: a batch of B responses; those to one prompt are adjacent.

    Attributes:
        rewards: Token rewards of each response, `[T]` float32: step rewards where a term gives them, the outcome on the
            last token, minus the weighted KL of every token where `ppo.kl.where` is `reward`.
        values: The critic's values of each response, `[T + 1]` float32, before each token and after the last; the last
            is 0 where the response is terminal; empty without a critic.
        gamma: Discount per token.
        gae_lambda: λ of generalized advantage estimation.
        samples_per_prompt: K, responses per prompt.
    """

    rewards: list[Tensor]
    values: list[Tensor]
    gamma: float
    gae_lambda: float
    samples_per_prompt: int


AdvantageEstimator = Callable[[EstimatorInput], tuple[list[Tensor], list[Tensor]]]
"""Maps a batch to the advantages of each response, `[T]` float32, and to the returns that the critic is trained on:
`[T]` float32 of each response, or empty tensors without a critic."""


def estimate_gae(batch: EstimatorInput) -> tuple[list[Tensor], list[Tensor]]:
    """Generalized advantage estimation, the only built-in estimator with a critic."""
    advantages = []
    returns = []
    for response_advantages, response_returns in batch_gae(batch.rewards, batch.values, batch.gamma, batch.gae_lambda):
        advantages.append(response_advantages)
        returns.append(response_returns)
    return advantages, returns


def estimate_rloo(batch: EstimatorInput) -> tuple[list[Tensor], list[Tensor]]:
    """REINFORCE leave-one-out: one advantage for all tokens of a response."""
    advantages = rloo(_totals(batch.rewards), batch.samples_per_prompt)
    return _same_for_all_tokens(advantages, batch.rewards), batch.values


def estimate_grpo(batch: EstimatorInput) -> tuple[list[Tensor], list[Tensor]]:
    """Group-relative policy optimization: one advantage for all tokens of a response."""
    advantages = grpo(_totals(batch.rewards), batch.samples_per_prompt)
    return _same_for_all_tokens(advantages, batch.rewards), batch.values


def estimate_reinforce_plus_plus(batch: EstimatorInput) -> tuple[list[Tensor], list[Tensor]]:
    """REINFORCE++: rewards to go, which `make_episodes` then whitens over the batch."""
    return discounted_sums(batch.rewards, batch.gamma), batch.values


def _totals(rewards: Sequence[Tensor]) -> Tensor:
    """Total reward of each response, `[B]`."""
    return torch.stack([response.sum() for response in rewards])


def _same_for_all_tokens(advantages: Tensor, rewards: Sequence[Tensor]) -> list[Tensor]:
    """One advantage per response, `[B]`, expanded to all tokens: `[T]` of each response."""
    return [advantage.expand(len(response)) for advantage, response in zip(advantages, rewards, strict=True)]


def load_estimator(name: str) -> AdvantageEstimator:
    """The function of a built-in estimator, or of a user's, which then raises UserError where it fails.

    Raises:
        UserError: There is no such estimator.
    """
    if name not in ESTIMATORS:
        return partial(_users_estimator, user_function(name, "ppo.estimator"), name)
    function: AdvantageEstimator = pkgutil.resolve_name(ESTIMATORS[name].function)
    return function


def _users_estimator(function: Function, name: str, batch: EstimatorInput) -> tuple[list[Tensor], list[Tensor]]:
    """Call a user's estimator and check its result."""
    result = call_user_function(function, name, "ppo.estimator", batch)
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise UserError(
            f"ppo.estimator: {name} returned {describe(result)}; expected (advantages, returns), two lists with one "
            "tensor per response"
        )
    advantages, returns = result
    check_estimates(name, batch, advantages, returns)
    return list(advantages), list(returns)


def check_estimates(name: str, batch: EstimatorInput, advantages: Any, returns: Any) -> None:
    """Check the types and shapes of what an estimator returned for a batch.

    Args:
        name: The value of `ppo.estimator`.
        batch: The input of the estimator.
        advantages: Anything; a list of `[T]` float32 is right.
        returns: Anything; the same is right with a critic, and a list of empty tensors without one.

    Raises:
        UserError: There is not one advantage per token and, with a critic, one return per token.
    """
    tokens = [len(rewards) for rewards in batch.rewards]
    _check_list(name, "advantages", advantages, tokens)
    if find_estimator(name).has_critic:
        _check_list(name, "returns", returns, tokens)
        return
    try:
        _check_list(name, "returns", returns, [0] * len(tokens))
    except UserError as error:
        raise UserError(f"{error}, because it has no critic: return batch.values as the returns") from None


def _check_list(name: str, kind: str, tensors: Any, lengths: Sequence[int]) -> None:
    """Raise UserError unless `tensors` is a list of float32 vectors of these lengths."""
    is_list = isinstance(tensors, tuple | list)
    if not is_list or not all(_is_vector(tensor) for tensor in tensors):
        raise UserError(
            f"ppo.estimator: {name} returned {kind} that are {describe(tensors)}; expected a list with one tensor per "
            f"response, [T] float32, for the first responses of lengths {list(lengths[:8])}"
        )
    actual = [len(tensor) for tensor in tensors]
    if actual != list(lengths):
        raise UserError(
            f"ppo.estimator: {name} returned {kind} of {actual[:8]} numbers for the first responses of a batch of "
            f"{len(lengths)}; expected {list(lengths[:8])}"
        )


def _is_vector(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and value.dtype == torch.float32
