"""The frontier and the efficiency of policies in worlds whose optimum is known."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from align.evaluation.frontier import (
    BestMean,
    Efficiency,
    FrontierPoint,
    FrontierSamples,
    best_kl,
    best_mean,
    effective_samples,
    efficiency,
    frontier_point,
)
from align.evaluation.intervals import mean_interval

POPULATION = 4000
PROMPTS, SAMPLES = 128, 128
TRIALS = 500


@dataclass(frozen=True)
class World:
    """Prompts with the probabilities, rewards and gold scores `[prompts, A]` of all responses under the reference."""

    logprobs: Tensor
    rewards: Tensor
    gold: Tensor

    def at(self, prompts: Tensor) -> "World":
        return World(self.logprobs[prompts], self.rewards[prompts], self.gold[prompts])

    def best_logprobs(self, beta: float) -> Tensor:
        return (self.logprobs + self.rewards / beta).log_softmax(-1)

    def kl(self, logprobs: Tensor) -> Tensor:
        """`[prompts]`, by the definition."""
        return (logprobs.exp() * (logprobs - self.logprobs)).sum(-1)

    def beta_at(self, kl: float) -> float:
        def excess(log_beta: float) -> float:
            return float(self.kl(self.best_logprobs(math.exp(log_beta))).mean()) - kl

        return math.exp(brentq(excess, math.log(1e-3), math.log(1e3), xtol=1e-12))

    def gain(self, logprobs: Tensor, of: Tensor) -> float:
        return float(((logprobs.exp() - self.logprobs.exp()) * of).sum(-1).mean())


def bandit() -> World:
    """Forty responses to each prompt; the gold score agrees with the reward in part."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    logprobs = (1.5 * normal(POPULATION, 40)).log_softmax(-1)
    rewards = normal(POPULATION, 40) + normal(POPULATION, 1)
    return World(logprobs, rewards, 0.6 * rewards + 0.5 * normal(POPULATION, 40))


def chain() -> World:
    """All sequences of four tokens from a vocabulary of four, whose rewards are sums over neighbours."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.cartesian_prod(*[torch.arange(4)] * 4)  # [256, 4]
    logits = torch.randn(POPULATION, 5, 4, dtype=torch.float64, generator=generator)
    moves = logits.log_softmax(-1)  # the row of the token before; row 4 is the start
    before = torch.cat([torch.full((256, 1), 4), tokens[:, :-1]], 1)
    logprobs = moves[:, before, tokens].sum(-1)  # [P, 256]
    pairs = torch.randn(POPULATION, 4, 4, dtype=torch.float64, generator=generator)
    rewards = pairs[:, tokens[:, :-1], tokens[:, 1:]].sum(-1) / 2
    return World(logprobs, rewards, rewards - 0.1 * (tokens == 0).sum(-1))


WORLDS = {"bandit": bandit(), "chain": chain()}


def drawn(logprobs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Responses `[count, prompts]`."""
    return torch.multinomial(logprobs.exp(), count, replacement=True, generator=generator).T


def look_up(table: Tensor, responses: Tensor) -> Tensor:
    """Values `[N, prompts]` of responses `[N, prompts]`."""
    return table.gather(1, responses.T).T


def point_at(samples: FrontierSamples, kl: float) -> FrontierPoint:
    point = frontier_point(samples, kl)
    assert point is not None
    return point


@dataclass(frozen=True)
class Drawn:
    """Responses to each prompt, and their gold scores `[N, prompts]`."""

    samples: FrontierSamples
    gold: Tensor

    def gains(self, kl: float) -> tuple[BestMean, BestMean]:
        """How much the best policy at a KL gains over the reference that these are samples of: reward, gold score."""
        point = point_at(self.samples, kl)
        assert point.effective_samples >= 50
        both = []
        for values in (self.samples.scores, self.gold):
            best = best_mean(self.samples, values, point)
            both.append(BestMean(best.values - values.mean(0), best.slope))
        return both[0], both[1]


def drawn_from_reference(world: World, count: int, generator: torch.Generator) -> Drawn:
    responses = drawn(world.logprobs, count, generator)
    return Drawn(FrontierSamples(look_up(world.rewards, responses)), look_up(world.gold, responses))


def share(inside: list[bool]) -> float:
    return sum(inside) / len(inside)


@pytest.mark.parametrize("kl", [0.2, 0.5])
@pytest.mark.parametrize("name", WORLDS)
def test_intervals_of_the_frontier_cover_its_score_and_gold_score(name: str, kl: float) -> None:
    world = WORLDS[name]
    best = world.best_logprobs(world.beta_at(kl))
    truths = [world.gain(best, world.rewards), world.gain(best, world.gold)]
    generator = torch.Generator().manual_seed(2)
    inside: list[list[bool]] = [[], []]
    for _ in range(TRIALS):
        prompts = torch.randint(POPULATION, (PROMPTS,), generator=generator)
        gains = drawn_from_reference(world.at(prompts), SAMPLES, generator).gains(kl)
        for covered, gain, truth in zip(inside, gains, truths, strict=True):
            ends = mean_interval(gain.values)
            assert ends is not None
            covered.append(ends[0] <= truth <= ends[1])
    assert all(0.92 <= share(covered) <= 0.98 for covered in inside)


def best_of(world: World, n: int) -> Tensor:
    """Log-probabilities of the response with the highest reward of n: F(r)ⁿ less that of the next lower reward."""
    order = world.rewards.argsort(-1)
    below = world.logprobs.exp().gather(1, order).cumsum(-1).clamp(max=1)
    powers = below**n
    probabilities = torch.diff(powers, prepend=torch.zeros(len(order), 1, dtype=torch.float64))
    return torch.zeros_like(probabilities).scatter(1, order, probabilities).clamp_min(1e-300).log()


POLICIES: dict[str, Callable[[World], Tensor]] = {
    "optimum": lambda world: world.best_logprobs(world.beta_at(0.4)),
    "best of 3": lambda world: best_of(world, 3),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", WORLDS)
def test_intervals_of_the_efficiency_cover_it(name: str, policy: str) -> None:
    """With four samples per prompt from the policy, whose KL is estimated by their log-ratios."""
    world = WORLDS[name]
    logprobs = POLICIES[policy](world)
    best = world.best_logprobs(world.beta_at(float(world.kl(logprobs).mean())))
    truth = world.gain(logprobs, world.rewards) / world.gain(best, world.rewards)
    assert truth == pytest.approx(1, abs=1e-9) if policy == "optimum" else 0.8 < truth < 0.99
    generator = torch.Generator().manual_seed(3)
    covered = []
    for _ in range(TRIALS):
        prompts = torch.randint(POPULATION, (PROMPTS,), generator=generator)
        found = efficiency_of(logprobs[prompts], world.at(prompts), generator)
        covered.append(found.low <= truth <= found.high)
    assert 0.92 <= share(covered) <= 0.98


def efficiency_of(logprobs: Tensor, world: World, generator: torch.Generator) -> Efficiency:
    reference = drawn_from_reference(world, SAMPLES, generator)
    responses = drawn(logprobs, 4, generator)
    gain = look_up(world.rewards, responses).mean(0) - reference.samples.scores.mean(0)
    kl = look_up(logprobs - world.logprobs, responses).mean(0)
    best, _ = reference.gains(float(kl.mean()))
    return efficiency(gain, kl, best.values, best.slope)


def test_the_efficiency_of_best_of_8_is_what_it_is_exactly() -> None:
    world = WORLDS["bandit"]
    logprobs = best_of(world, 8)
    kl = float(world.kl(logprobs).mean())
    truth = world.gain(logprobs, world.rewards) / world.gain(world.best_logprobs(world.beta_at(kl)), world.rewards)
    here = world.at(torch.arange(1000))
    generator = torch.Generator().manual_seed(8)
    reference = drawn_from_reference(here, 1024, generator)
    point = point_at(reference.samples, kl)
    best = best_mean(reference.samples, reference.samples.scores, point)
    baseline = reference.samples.scores.mean(0)
    gain = (logprobs[:1000].exp() * here.rewards).sum(-1) - baseline
    found = efficiency(gain, here.kl(logprobs[:1000]), best.values - baseline, best.slope)
    assert found.low <= truth <= found.high
    assert found.high - found.low < 0.05


@pytest.mark.parametrize("name", WORLDS)
def test_samples_of_a_policy_show_the_frontier_where_those_of_the_reference_do_not(name: str) -> None:
    world = WORLDS[name].at(torch.arange(2000))
    generator = torch.Generator().manual_seed(4)
    kl = 2.0
    policy = world.best_logprobs(world.beta_at(1.8))
    responses = drawn(policy, 64, generator)
    samples = FrontierSamples(look_up(world.rewards, responses), look_up(policy - world.logprobs, responses))
    point = point_at(samples, kl)
    assert frontier_point(drawn_from_reference(world, 64, generator).samples, kl) is None
    assert point.beta == pytest.approx(world.beta_at(kl), rel=0.02)
    best = world.best_logprobs(world.beta_at(kl))
    for table in (world.rewards, world.gold):
        estimate = best_mean(samples, look_up(table, responses), point).values
        truth = float((best.exp() * table).sum(-1).mean())
        assert abs(float(estimate.mean()) - truth) < 4 * float(estimate.std()) / math.sqrt(len(estimate))


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_many_samples_give_what_the_definition_does(beta: float) -> None:
    world = WORLDS["bandit"].at(torch.arange(20))
    reference = drawn_from_reference(world, 200_000, torch.Generator().manual_seed(5))
    best = world.best_logprobs(beta)
    torch.testing.assert_close(best_kl(reference.samples, beta), world.kl(best), rtol=0.05, atol=0.01)
    point = FrontierPoint(float(best_kl(reference.samples, beta).mean()), beta, 0.0)
    for table, values in ((world.rewards, reference.samples.scores), (world.gold, reference.gold)):
        estimate = float(best_mean(reference.samples, values, point).values.mean())
        assert estimate == pytest.approx(float((best.exp() * table).sum(-1).mean()), abs=0.01)


def test_the_slope_is_the_derivative_along_the_frontier() -> None:
    reference = drawn_from_reference(WORLDS["bandit"].at(torch.arange(50)), 64, torch.Generator().manual_seed(6))
    samples = FrontierSamples(reference.samples.scores.repeat(2, 1))  # equal halves: there is nothing to correct
    gold = reference.gold.repeat(2, 1)
    low, middle, high = (point_at(samples, kl) for kl in (0.4 - 1e-5, 0.4, 0.4 + 1e-5))
    for values, slope in ((samples.scores, middle.beta), (gold, best_mean(samples, gold, middle).slope)):
        above, below = (float(best_mean(samples, values, point).values.mean()) for point in (high, low))
        assert slope == pytest.approx((above - below) / 2e-5, rel=1e-3)
    assert best_mean(samples, samples.scores, middle).slope == pytest.approx(middle.beta)


def test_equal_weights_count_all_samples_and_one_large_weight_counts_one() -> None:
    scores = torch.zeros(8, 3, dtype=torch.float64)
    assert effective_samples(FrontierSamples(scores), 1.0) == pytest.approx(8)
    scores[0] = 1e3
    assert effective_samples(FrontierSamples(scores), 1.0) == pytest.approx(1)


@pytest.mark.parametrize("kl", [0.2, 50.0])
def test_no_point_is_given_where_the_samples_cannot_show_it(kl: float) -> None:
    scores = torch.randn(64, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    assert frontier_point(FrontierSamples(torch.zeros_like(scores)), kl) is None
    assert (frontier_point(FrontierSamples(scores), kl) is None) == (kl == 50.0)
