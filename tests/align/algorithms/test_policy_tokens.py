"""Tokens that the policy has not sampled take no time and have no loss."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.algorithms.advantages import whiten
from align.algorithms.estimators import EstimatorInput, load_estimator
from align.algorithms.losses import clipped_policy_loss
from align.algorithms.policy_tokens import estimate_over_policy_tokens, policy_rewards, token_weights

ESTIMATORS = ("gae", "rloo", "grpo", "reinforce++")
NUMBERS = st.floats(-3, 3, width=32)


@dataclass
class Response:
    """Rewards `[T]`, values `[T + 1]` and a mask `[T]`."""

    rewards: Tensor
    values: Tensor
    mask: Tensor


@st.composite
def responses(draw: st.DrawFn) -> list[Response]:
    """Four responses, at least one of whose tokens is the policy's."""
    drawn = []
    for _ in range(4):
        mask = draw(st.lists(st.booleans(), min_size=1, max_size=8).filter(any))
        rewards = draw(st.lists(NUMBERS, min_size=len(mask), max_size=len(mask)))
        values = draw(st.lists(NUMBERS, min_size=len(mask) + 1, max_size=len(mask) + 1))
        drawn.append(Response(torch.tensor(rewards), torch.tensor(values), torch.tensor(mask)))
    return drawn


def estimated(name: str, batch: list[Response]) -> list[Tensor]:
    """The advantages of all tokens."""
    has_critic = name == "gae"
    given_values = [response.values if has_critic else torch.empty(0) for response in batch]
    rewards = [response.rewards for response in batch]
    arguments = EstimatorInput(rewards, given_values, gamma=0.9, gae_lambda=0.8, samples_per_prompt=2)
    masks = [response.mask for response in batch]
    advantages, returns = estimate_over_policy_tokens(load_estimator(name), arguments, masks)
    assert [len(values) for values in returns] == [len(mask) if has_critic else 0 for mask in masks]
    return advantages


def without_others(response: Response) -> Response:
    """The response in which the tokens that are not the policy's have no reward: what they earn is not the question."""
    return Response(response.rewards * response.mask, response.values, response.mask)


def policy_alone(response: Response) -> Response:
    """The policy's tokens of a response."""
    count = int(response.mask.sum())
    values = torch.cat([response.values[:-1][response.mask], response.values[-1:]])
    return Response(response.rewards[response.mask], values, torch.ones(count, dtype=torch.bool))


@pytest.mark.parametrize("name", ESTIMATORS)
@given(batch=responses())
@settings(max_examples=50)
def test_inserted_tokens_change_no_advantage_of_the_policys(name: str, batch: list[Response]) -> None:
    batch = [without_others(response) for response in batch]
    alone = estimated(name, [policy_alone(response) for response in batch])
    among = estimated(name, batch)
    for response, expected, advantages in zip(batch, alone, among, strict=True):
        assert torch.equal(advantages[response.mask], expected)
        assert not advantages[~response.mask].any()
    inserted = torch.cat([advantages[response.mask] for advantages, response in zip(among, batch, strict=True)])
    assert torch.equal(whiten(inserted), whiten(torch.cat(alone)))


def skipping_gae(response: Response, gamma: float, decay: float) -> list[float]:
    """GAE by a loop over all tokens in float64, in which only the policy's tokens discount."""
    advantages = [0.0] * len(response.mask)
    later_advantage = 0.0
    later_value = float(response.values[-1])
    earned = 0.0
    for t in reversed(range(len(response.mask))):
        earned += float(response.rewards[t])
        if response.mask[t]:
            value = float(response.values[t])
            later_advantage = earned + gamma * later_value - value + gamma * decay * later_advantage
            later_value = value
            earned = 0.0
            advantages[t] = later_advantage
    return advantages


@given(batch=responses())
@settings(max_examples=50)
def test_gae_skips_the_other_tokens_and_keeps_their_rewards(batch: list[Response]) -> None:
    for response in batch:
        response.mask[0] = True  # what is earned before the first of the policy's tokens has a test of its own
    for response, advantages in zip(batch, estimated("gae", batch), strict=True):
        expected = torch.tensor(skipping_gae(response, 0.9, 0.8))
        torch.testing.assert_close(advantages, expected, atol=1e-4, rtol=1e-5)


def test_rewards_of_other_tokens_belong_to_the_policys_token_before_them_or_to_the_first() -> None:
    mask = torch.tensor([False, True, False, False, True, False])
    assert policy_rewards(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), mask).tolist() == [15.0, 48.0]


def test_a_response_without_a_token_of_the_policys_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the 3 tokens is the policy's"):
        policy_rewards(torch.zeros(3), torch.zeros(3, dtype=torch.bool))


def test_the_loss_and_its_gradient_are_over_the_policys_tokens_alone() -> None:
    mask = torch.tensor([True, False, True, False])
    logprobs = torch.tensor([-0.1, -0.7, -0.4, -0.2], requires_grad=True)
    old_logprobs = torch.tensor([-0.2, -0.1, -0.3, -0.9])
    advantages = torch.tensor([1.0, 5.0, -1.0, 5.0])
    losses, _ = clipped_policy_loss(logprobs, old_logprobs, advantages, low=0.2, high=0.2)
    alone, _ = clipped_policy_loss(logprobs[mask], old_logprobs[mask], advantages[mask], low=0.2, high=0.2)
    loss = losses @ token_weights(0.5, mask)
    torch.testing.assert_close(loss, 0.5 * alone.sum())
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert (gradient != 0).tolist() == mask.tolist()
