import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.algorithms.advantages import (
    batch_gae,
    discounted_sums,
    explained_variance,
    gae,
    grpo,
    has_spread,
    rloo,
    scale_rewards,
    token_rewards,
    whiten,
)

NUMBERS = st.floats(-10, 10, width=32)
STEPS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30)


@given(STEPS, NUMBERS, st.floats(0.05, 1), st.floats(0, 1))
def test_gae_is_the_double_sum(steps: list[tuple[float, float]], last: float, gamma: float, gae_lambda: float) -> None:
    rewards = [reward for reward, _ in steps]
    values = [*(value for _, value in steps), last]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    oracle = [
        sum((gamma * gae_lambda) ** k * deltas[t + k] for k in range(len(deltas) - t)) for t in range(len(deltas))
    ]
    advantages, returns = gae(torch.tensor(rewards), torch.tensor(values), gamma, gae_lambda)
    torch.testing.assert_close(advantages.double(), torch.tensor(oracle, dtype=torch.float64), rtol=1e-4, atol=1e-3)
    expected = torch.tensor([a + v for a, v in zip(oracle, values)], dtype=torch.float64)
    torch.testing.assert_close(returns.double(), expected, rtol=1e-4, atol=1e-3)


@given(STEPS, NUMBERS, st.floats(0.05, 1))
def test_gae_with_lambda_one_is_the_discounted_return(
    steps: list[tuple[float, float]], last: float, gamma: float
) -> None:
    rewards = [reward for reward, _ in steps]
    values = torch.tensor([*(value for _, value in steps), last])
    _, returns = gae(torch.tensor(rewards), values, gamma, gae_lambda=1.0)
    following, oracle = last, []
    for reward in reversed(rewards):
        following = reward + gamma * following
        oracle.append(following)
    torch.testing.assert_close(returns, torch.tensor(oracle[::-1]), rtol=1e-4, atol=1e-3)


def test_gae_with_lambda_zero_is_one_step() -> None:
    advantages, returns = gae(torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0, 40.0]), gamma=0.5, gae_lambda=0.0)
    assert advantages.tolist() == [1 + 10 - 10, 2 + 20 - 20]
    assert returns.tolist() == [11.0, 22.0]


def test_gae_by_hand() -> None:
    advantages, returns = gae(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.25, 0.0]), gamma=1.0, gae_lambda=0.95)
    assert advantages.tolist() == pytest.approx([-0.25 + 0.95 * 0.75, 0.75])
    assert returns.tolist() == pytest.approx([0.25 + 0.95 * 0.75, 1.0])


def test_last_value_enters_the_last_advantage() -> None:
    advantages, _ = gae(torch.tensor([0.0]), torch.tensor([1.0, 3.0]), gamma=0.9, gae_lambda=0.5)
    assert advantages.tolist() == pytest.approx([0.9 * 3 - 1])


@given(st.lists(STEPS, min_size=1, max_size=5), NUMBERS, st.floats(0.05, 1), st.floats(0, 1))
def test_gae_of_a_batch_is_that_of_each_response_bit_for_bit(
    batch: list[list[tuple[float, float]]], last: float, gamma: float, gae_lambda: float
) -> None:
    rewards = [torch.tensor([reward for reward, _ in steps]) for steps in batch]
    values = [torch.tensor([*(value for _, value in steps), last]) for steps in batch]
    estimates = batch_gae(rewards, values, gamma, gae_lambda)
    for (advantages, returns), response_rewards, response_values in zip(estimates, rewards, values, strict=True):
        expected = gae_token_by_token(response_rewards, response_values, gamma, gae_lambda)
        assert advantages.tolist() == expected.tolist()
        assert returns.tolist() == (expected + response_values[:-1]).tolist()


def gae_token_by_token(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    deltas = (rewards + gamma * values[1:] - values[:-1]).tolist()
    advantages = [0.0]
    for delta in reversed(deltas):
        advantages.append(delta + gamma * gae_lambda * advantages[-1])
    return torch.tensor(advantages[:0:-1])


def test_whitening_leaves_its_input_as_it_is() -> None:
    values = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    whiten(values)
    assert values.tolist() == [1.0, 2.0, 5.0]


def test_score_lands_on_the_last_token_alone() -> None:
    rewards = token_rewards(5.0, torch.tensor([0.1, -0.2, 0.3]), coefficient=2.0)
    torch.testing.assert_close(rewards, torch.tensor([-0.2, 0.4, 4.4]))


def test_a_step_reward_lands_on_its_token() -> None:
    rewards = token_rewards(5.0, torch.tensor([0.1, -0.2, 0.3]), 2.0, torch.tensor([1.0, 0.0, -2.0]))
    torch.testing.assert_close(rewards, torch.tensor([0.8, 0.4, 2.4]))


def test_token_rewards_leave_their_inputs_as_they_were() -> None:
    kl = torch.tensor([0.1, 0.2])
    steps = torch.tensor([1.0, 2.0])
    token_rewards(5.0, kl, 1.0, steps)
    assert kl.tolist() == pytest.approx([0.1, 0.2])
    assert steps.tolist() == [1.0, 2.0]


@given(st.lists(NUMBERS, min_size=2, max_size=50))
def test_whitened_numbers_have_mean_zero_and_deviation_one(numbers: list[float]) -> None:
    given_ = torch.tensor(numbers, dtype=torch.float64)
    whitened = whiten(given_)
    assert float(whitened.mean()) == pytest.approx(0, abs=1e-6)
    if float(given_.std(correction=0)) > 1e-3:  # far more than rounding
        assert float(whitened.std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_whitening_is_of_the_population() -> None:
    assert whiten(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-1.0, 1.0])


def test_whitening_one_number_gives_zero() -> None:
    assert whiten(torch.tensor([7.0])).tolist() == [0.0]


def test_whitening_equal_numbers_gives_zeros() -> None:
    assert whiten(torch.full((5,), 0.5)).tolist() == [0.0] * 5


@given(NUMBERS, st.integers(1, 50))
def test_whitening_equal_numbers_gives_zeros_whatever_their_rounding(number: float, count: int) -> None:
    assert float(whiten(torch.full((count,), number)).abs().max()) < 1e-3


def test_explained_variance_of_a_perfect_critic_is_one() -> None:
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1.0


def test_explained_variance_of_a_constant_is_zero_whatever_the_constant() -> None:
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(torch.full((3,), 9.0), returns) == pytest.approx(0.0, abs=1e-6)


def test_explained_variance_by_hand() -> None:
    values, returns = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 2.0, 1.0, 3.0])
    assert explained_variance(values, returns) == pytest.approx(1 - 1.0 / 1.25)


def test_explained_variance_of_equal_returns_is_not_a_number() -> None:
    assert math.isnan(explained_variance(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0])))


GROUPS = st.integers(2, 6).flatmap(
    lambda samples: st.tuples(
        st.just(samples), st.lists(st.lists(NUMBERS, min_size=samples, max_size=samples), min_size=1, max_size=5)
    )
)


@given(GROUPS)
def test_rloo_is_each_total_less_the_mean_of_the_others(groups: tuple[int, list[list[float]]]) -> None:
    samples, totals = groups
    oracle = [
        total - sum(other for j, other in enumerate(group) if j != i) / (samples - 1)
        for group in totals
        for i, total in enumerate(group)
    ]
    got = rloo(torch.tensor(totals).flatten(), samples)
    torch.testing.assert_close(got.double(), torch.tensor(oracle, dtype=torch.float64), rtol=1e-5, atol=1e-4)


def has_spread_in_words(group: list[float]) -> bool:
    return max(group) - min(group) > 1e-6 * max(abs(total) for total in group)


@given(GROUPS)
def test_grpo_is_each_total_standardised_within_its_prompt(groups: tuple[int, list[list[float]]]) -> None:
    samples, totals = groups
    oracle = []
    for group in totals:
        mean = sum(group) / samples
        std = math.sqrt(sum((total - mean) ** 2 for total in group) / samples)
        oracle += [(total - mean) / (std + 1e-4) * has_spread_in_words(group) for total in group]
    got = grpo(torch.tensor(totals).flatten(), samples)
    torch.testing.assert_close(got.double(), torch.tensor(oracle, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimate", [grpo, rloo])
@pytest.mark.parametrize("total", [2.0, -2.0, 0.0, 1e-3, 1e6, 0.1])
def test_rounding_within_a_group_is_no_advantage(estimate: Callable[[Tensor, int], Tensor], total: float) -> None:
    """A few units in the last place of float32 between the samples, as batches of other shapes give."""
    rounding = torch.tensor([0.0, 6e-8, -6e-8, 1.2e-7, 0.0, -1.2e-7, 6e-8, 0.0])
    totals = torch.tensor(total) * (1 + rounding)
    assert estimate(totals, 8).tolist() == [0.0] * 8
    mixed = torch.cat([totals[:4], torch.tensor([0.0, 1.0, 0.0, 1.0])])
    assert estimate(mixed, 4)[:4].tolist() == [0.0] * 4
    assert estimate(mixed, 4)[4:].abs().min() > 0.5


def test_grpo_adds_a_ten_thousandth_to_the_standard_deviation() -> None:
    assert grpo(torch.tensor([0.0, 2e-4]), 2).tolist() == pytest.approx([-0.5, 0.5])


def test_whitening_leave_one_out_advantages_of_groups_without_spread_gives_zeros() -> None:
    totals = torch.tensor([0.1, 0.1, 0.1, 0.3, 0.3, 0.3]) + torch.tensor([0.0, 7e-9, 0.0, 0.0, 0.0, 3e-8])
    assert whiten(rloo(totals, 3)).tolist() == [0.0] * 6


@pytest.mark.parametrize("function", [whiten, lambda values: scale_rewards(values) - values.mean()])
def test_rounding_is_not_whitened(function: Callable[[Tensor], Tensor]) -> None:
    values = 5.0 * (1 + torch.tensor([0.0, 1.2e-7, -1.2e-7, 2.4e-7, 0.0]))
    assert function(values).abs().max() < 1e-5


def test_spread_is_relative_to_the_largest_value() -> None:
    groups = torch.tensor([[1.0, 1.0 + 1e-6, 1.0], [0.0, 1e-9, 0.0], [3.0, 3.00001, 3.0], [0.0, 0.0, 0.0]])
    assert has_spread(groups).tolist() == [False, True, True, False]


def test_values_that_are_no_numbers_have_spread() -> None:
    """So that they reach the loss, and the step is skipped and counted."""
    assert bool(has_spread(torch.tensor([1.0, math.nan])))
    assert grpo(torch.tensor([1.0, math.nan]), 2).isnan().all()


def test_explained_variance_of_returns_that_differ_by_rounding_is_not_a_number() -> None:
    returns = 3.0 * (1 + torch.tensor([0.0, 1.2e-7, -1.2e-7]))
    assert math.isnan(explained_variance(torch.zeros(3), returns))


@given(st.lists(NUMBERS, min_size=1, max_size=30), st.floats(0.05, 1))
def test_rewards_to_go_is_the_discounted_sum(rewards: list[float], gamma: float) -> None:
    oracle = [sum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]
    got = discounted_sums([torch.tensor(rewards)], gamma)[0]
    torch.testing.assert_close(got.double(), torch.tensor(oracle, dtype=torch.float64), rtol=1e-4, atol=1e-3)


def test_scaled_rewards_have_deviation_one_about_the_same_mean() -> None:
    scaled = scale_rewards(torch.tensor([0.0, 10.0, 20.0, 30.0]))
    assert float(scaled.mean()) == pytest.approx(15)
    assert float(scaled.std(correction=0)) == pytest.approx(1)
