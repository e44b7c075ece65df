"""Figures of the frontier and of policies, from worlds in which they are known."""

import math

import pytest
import torch
from torch import Tensor

from align.evaluation.distance import DrawnResponses, frontier_figures, policy_distance
from tests.align.evaluation.test_frontier import WORLDS, World, drawn, look_up


def responses_of(world: World, logprobs: Tensor | None, count: int, seed: int) -> DrawnResponses:
    generator = torch.Generator().manual_seed(seed)
    policy = world.logprobs if logprobs is None else logprobs
    responses = drawn(policy, count, generator)
    log_ratios = None if logprobs is None else look_up(logprobs - world.logprobs, responses)
    return DrawnResponses(look_up(world.rewards, responses), look_up(world.gold, responses), log_ratios)


@pytest.fixture(scope="module")
def world() -> World:
    return WORLDS["bandit"].at(torch.arange(1000))


@pytest.fixture(scope="module")
def reference(world: World) -> DrawnResponses:
    return responses_of(world, None, 128, seed=1)


def test_the_frontier_is_shown_as_far_as_the_samples_show_it(world: World, reference: DrawnResponses) -> None:
    points = frontier_figures(reference)
    kls = [point["kl"] for point in points]
    assert kls == [0.1, 0.25, 0.5, 0.75, 1.0]
    effective = [point["effective_samples"] for point in points]
    assert effective == sorted(effective, reverse=True)
    for point in points:
        best = world.best_logprobs(world.beta_at(point["kl"]))
        for name, of in (("score", world.rewards), ("gold", world.gold)):
            assert point[f"{name}_gain_low"] < point[f"{name}_gain"] < point[f"{name}_gain_high"]
            assert point[f"{name}_gain"] == pytest.approx(world.gain(best, of), abs=0.05)


@pytest.mark.parametrize(("kl", "origin"), [(0.6, "reference"), (2.0, "policy"), (2.0, None)])
def test_a_policy_on_the_frontier_has_an_efficiency_of_1(
    world: World, reference: DrawnResponses, kl: float, origin: str | None
) -> None:
    policy = responses_of(world, world.best_logprobs(world.beta_at(kl)), 4, seed=2)
    beside = responses_of(world, world.best_logprobs(world.beta_at(1.8)), 64, seed=4)
    figures = policy_distance(policy, reference, (lambda: beside) if origin else None)
    assert figures["kl"] == pytest.approx(kl, abs=0.1)
    if origin is None:  # the reference's samples do not show the best policy
        assert "best" not in figures
        assert "score_efficiency" not in figures
        return
    assert figures["best"]["from"] == origin
    assert figures["score_efficiency_low"] <= 1 <= figures["score_efficiency_high"]
    assert figures["score_efficiency"] == pytest.approx(1, abs=0.05)
    assert figures["gold_efficiency_low"] <= 1 <= figures["gold_efficiency_high"]


def test_near_the_reference_no_efficiency_is_given(world: World, reference: DrawnResponses) -> None:
    policy = responses_of(world, world.best_logprobs(world.beta_at(0.1)), 4, seed=3)
    figures = policy_distance(policy, reference)
    assert "score_efficiency" not in figures
    assert {"kl", "kl_low", "kl_high", "score_gain", "gold_gain_high"} <= figures.keys()


def test_without_a_gold_score_only_the_score_has_figures(world: World, reference: DrawnResponses) -> None:
    policy = responses_of(world, world.best_logprobs(world.beta_at(0.6)), 4, seed=2)
    figures = policy_distance(DrawnResponses(policy.scores, None, policy.log_ratios), DrawnResponses(reference.scores))
    assert "score_efficiency" in figures
    assert not any(name.startswith("gold") for name in [*figures, *figures["best"]])
    assert not any(math.isnan(value) for value in figures.values() if isinstance(value, float))
