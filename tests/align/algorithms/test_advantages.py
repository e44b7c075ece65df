import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.algorithms.advantages import (
    explained_variance,
    gae,
    grpo,
    rewards_to_go,
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


def test_score_lands_on_the_last_token_alone() -> None:
    rewards = token_rewards(5.0, torch.tensor([0.1, -0.2, 0.3]), coefficient=2.0)
    torch.testing.assert_close(rewards, torch.tensor([-0.2, 0.4, 4.4]))


def test_token_rewards_leave_the_kl_as_it_was() -> None:
    kl = torch.tensor([0.1, 0.2])
    token_rewards(5.0, kl, coefficient=1.0)
    torch.testing.assert_close(kl, torch.tensor([0.1, 0.2]))


@given(st.lists(NUMBERS, min_size=2, max_size=50))
def test_whitened_numbers_have_mean_zero_and_deviation_one(numbers: list[float]) -> None:
    given_ = torch.tensor(numbers, dtype=torch.float64)
    whitened = whiten(given_)
    assert float(whitened.mean()) == pytest.approx(0, abs=1e-6)
    if float(given_.std(correction=0)) > 1e-3:
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


@given(GROUPS)
def test_grpo_is_each_total_standardised_within_its_prompt(groups: tuple[int, list[list[float]]]) -> None:
    samples, totals = groups
    oracle = []
    for group in totals:
        mean = sum(group) / samples
        std = math.sqrt(sum((total - mean) ** 2 for total in group) / samples)
        oracle += [(total - mean) / (std + 1e-8) for total in group]
    got = grpo(torch.tensor(totals).flatten(), samples)
    torch.testing.assert_close(got.double(), torch.tensor(oracle, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_grpo_learns_nothing_from_a_prompt_whose_samples_are_equal() -> None:
    assert grpo(torch.tensor([2.0, 2.0, 2.0, 1.0, 3.0, 5.0]), 3)[:3].tolist() == [0.0, 0.0, 0.0]


@given(st.lists(NUMBERS, min_size=1, max_size=30), st.floats(0.05, 1))
def test_rewards_to_go_is_the_discounted_sum(rewards: list[float], gamma: float) -> None:
    oracle = [sum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]
    got = rewards_to_go(torch.tensor(rewards), gamma)
    torch.testing.assert_close(got.double(), torch.tensor(oracle, dtype=torch.float64), rtol=1e-4, atol=1e-3)


def test_scaled_rewards_have_deviation_one_about_the_same_mean() -> None:
    scaled = scale_rewards(torch.tensor([0.0, 10.0, 20.0, 30.0]))
    assert float(scaled.mean()) == pytest.approx(15)
    assert float(scaled.std(correction=0)) == pytest.approx(1)
