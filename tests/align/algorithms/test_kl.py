import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.algorithms.kl import AdaptiveKl, FixedKl, estimate_kl

LOGPROBS = st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=20)


def two_distributions() -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of a policy and a reference over 7 tokens, float64."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    policy, reference = torch.log_softmax(logits, -1)
    return policy, reference


@given(LOGPROBS)
def test_estimators_are_their_formulas(pairs: list[tuple[float, float]]) -> None:
    policy, reference = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
    oracle = {
        "k1": [p - r for p, r in pairs],
        "k2": [(p - r) ** 2 / 2 for p, r in pairs],
        "k3": [math.exp(r - p) - 1 + p - r for p, r in pairs],
    }
    for name, expected in oracle.items():
        actual = estimate_kl(policy, reference, name)
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_under_the_policy(estimator: str) -> None:
    policy, reference = two_distributions()
    exact = (policy.exp() * (policy - reference)).sum()
    expected = (policy.exp() * estimate_kl(policy, reference, estimator)).sum()
    torch.testing.assert_close(expected, exact, rtol=1e-12, atol=1e-12)


def test_k2_is_biased_and_its_gradient_is_not() -> None:
    policy, reference = two_distributions()
    exact = (policy.exp() * (policy - reference)).sum()
    assert abs(float((policy.exp() * estimate_kl(policy, reference, "k2")).sum() - exact)) > 1e-3

    logits = policy.clone().requires_grad_(True)
    logprobs = torch.log_softmax(logits, -1)
    (kl_gradient,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits)
    logprobs = torch.log_softmax(logits, -1)
    (k2_gradient,) = torch.autograd.grad(
        (logprobs.detach().exp() * estimate_kl(logprobs, reference, "k2")).sum(), logits
    )
    torch.testing.assert_close(k2_gradient, kl_gradient, rtol=1e-10, atol=1e-10)


def test_the_gradient_of_k3_is_that_of_the_reversed_kl() -> None:
    policy, reference = two_distributions()
    logits = policy.clone().requires_grad_(True)
    logprobs = torch.log_softmax(logits, -1)
    (reversed_kl_gradient,) = torch.autograd.grad((reference.exp() * (reference - logprobs)).sum(), logits)
    logprobs = torch.log_softmax(logits, -1)
    (k3_gradient,) = torch.autograd.grad(
        (logprobs.detach().exp() * estimate_kl(logprobs, reference, "k3")).sum(), logits
    )
    torch.testing.assert_close(k3_gradient, reversed_kl_gradient, rtol=1e-10, atol=1e-10)


@given(LOGPROBS)
def test_k2_and_k3_are_never_negative_even_in_float32(pairs: list[tuple[float, float]]) -> None:
    policy, reference = torch.tensor(pairs, dtype=torch.float32).unbind(-1)
    assert (estimate_kl(policy, reference, "k2") >= 0).all()
    assert (estimate_kl(policy, reference, "k3") >= -1e-6).all()


def test_k1_is_negative_where_the_reference_is_more_likely() -> None:
    assert estimate_kl(torch.tensor([-2.0]), torch.tensor([-1.0]), "k1").tolist() == [-1.0]


def test_k3_of_a_small_difference_keeps_its_digits() -> None:
    small = torch.tensor([1e-3])
    assert float(estimate_kl(small, torch.zeros(1), "k3")) == pytest.approx(5e-7, rel=0.1)


def test_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        estimate_kl(torch.zeros(1), torch.zeros(1), "k4")


def test_fixed_coefficient_never_moves() -> None:
    coefficient = FixedKl(0.05)
    coefficient.update(kl=1e6, episodes=10**6)
    assert coefficient.value == 0.05


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),  # at the target
        (6.6, 1 + 0.1 * 64 / 1000),  # 10 % above
        (5.4, 1 - 0.1 * 64 / 1000),
        (600.0, 1 + 0.2 * 64 / 1000),  # the error is clipped
        (-600.0, 1 - 0.2 * 64 / 1000),
    ],
)
def test_adaptive_coefficient_follows_ziegler(kl: float, factor: float) -> None:
    coefficient = AdaptiveKl(0.1, target=6.0, horizon=1000)
    coefficient.update(kl, episodes=64)
    assert coefficient.value == pytest.approx(0.1 * factor, rel=1e-12)


@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.integers(1, 10**6))
def test_adaptive_coefficient_stays_positive_and_bounded(kls: list[float], episodes: int) -> None:
    coefficient = AdaptiveKl(0.1, target=6.0, horizon=1000)
    for kl in kls:
        coefficient.update(kl, episodes)
    assert 1e-6 <= coefficient.value <= 1e3


def test_adaptive_coefficient_steers_a_simulated_kl_to_its_target() -> None:
    coefficient = AdaptiveKl(0.1, target=6.0, horizon=1000)
    for _ in range(2000):
        coefficient.update(kl=0.9 / coefficient.value, episodes=64)
    assert 0.9 / coefficient.value == pytest.approx(6.0, rel=0.01)


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_adaptive_coefficient_ignores_a_kl_that_is_not_finite(kl: float) -> None:
    coefficient = AdaptiveKl(0.1, target=6.0, horizon=1000)
    coefficient.update(kl, episodes=64)
    assert coefficient.value == 0.1
