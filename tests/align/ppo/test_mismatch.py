"""Rounding of logits never stops a run; other weights do, in float32 and in bfloat16."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.ppo.mismatch import Mismatch, MismatchCheck, SamplerMismatch, check_parity, sampler_mismatch
from align.roles.build import Blueprint, build_roles
from align.roles.roles import Roles
from align.roles.scoring import score_microbatch
from policies.logprobs import shortfalls
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights
from rollouts.engine import Sampling
from rollouts.pool import LocalPool
from rollouts.trajectory import Request, RoleOutputs, Trajectory
from rollouts.transformers_engine import SAMPLER_ROLE, TransformersEngine

UNIT = 0.125
"""The distance of neighbouring bfloat16 numbers from 16 to 32."""


def pair(sampler: list[float], learner: list[float]) -> tuple[Trajectory, RoleOutputs]:
    row = Trajectory.from_tokens(Request("Why?", (1,), 0), tuple(range(len(sampler))), torch.tensor(sampler), True, 0)
    return row, RoleOutputs(torch.tensor(learner), torch.zeros(len(learner)), torch.empty(0), 0.0)


PAIRS = [pair([-1.0, -2.0], [-1.5, -2.0]), pair([-3.0], [-2.5])]
TRAJECTORIES = [trajectory for trajectory, _ in PAIRS]
OUTPUTS = [outputs for _, outputs in PAIRS]


def test_mismatch_is_the_difference_at_every_token() -> None:
    assert sampler_mismatch(TRAJECTORIES, OUTPUTS).tolist() == [0.5, 0.0, 0.5]


def test_differences_are_counted_in_units() -> None:
    mismatch = Mismatch.of(torch.tensor([0.5, 0.0, 1.25]), UNIT)
    assert (mismatch.mean, mismatch.large_share) == pytest.approx((14 / 3, 1 / 3))
    assert Mismatch.of(torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.125])) == Mismatch(4.5, 0.0)


def test_a_mean_mismatch_over_the_users_limit_ends_the_run() -> None:
    MismatchCheck(UNIT, limit=0.34)(TRAJECTORIES, OUTPUTS)
    with pytest.raises(SamplerMismatch, match=r"0\.333 nats per token.*max_mismatch is 0\.3"):
        MismatchCheck(UNIT, limit=0.3)(TRAJECTORIES, OUTPUTS)


def test_without_a_limit_only_what_rounding_cannot_explain_ends_the_run() -> None:
    MismatchCheck(UNIT)(TRAJECTORIES, OUTPUTS)
    with pytest.raises(SamplerMismatch, match=r"0\.333 nats per token on average, 341 units in the last place"):
        MismatchCheck(2.0**-10)(TRAJECTORIES, OUTPUTS)
    MismatchCheck(2.0**-10, same_weights=False)(TRAJECTORIES, OUTPUTS)


def test_the_user_is_warned_once_before_a_run_is_stopped(caplog: pytest.LogCaptureFixture) -> None:
    check = MismatchCheck(UNIT)
    with caplog.at_level(logging.WARNING):
        check(TRAJECTORIES, OUTPUTS)
        check(TRAJECTORIES, OUTPUTS)
    (message,) = caplog.messages
    assert "2.67 units in the last place of the logits on average" in message


@pytest.mark.parametrize("limit", [None, 0.3])
def test_a_mismatch_that_is_not_a_number_ends_the_run(limit: float | None) -> None:
    row, output = pair([-1.0], [float("nan")])
    with pytest.raises(SamplerMismatch):
        MismatchCheck(UNIT, limit)([row], [output])


@pytest.mark.parametrize(
    ("dtype", "step"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10), (torch.float32, 2.0**-10)]
)
def test_spacings_are_those_of_the_dtype_at_the_largest_logit(dtype: torch.dtype, step: float) -> None:
    logits = torch.tensor([[16.0, -3.0, 1.0], [31.0, 0.0, 8.0], [-40.0, -2.0, -3.0], [0.75, 0.5, 0.0]], dtype=dtype)
    behind, spacings = shortfalls(logits, torch.tensor([0, 2, 0, 1]), head=lambda states: states)
    assert behind.tolist() == [0.0, 23.0, 38.0, 0.25]
    assert spacings.tolist() == [16 * step, 16 * step, 32 * step, 0.5 * step]
    if dtype == torch.bfloat16:
        one = torch.tensor([16.0], dtype=dtype)
        assert float(torch.nextafter(one, torch.tensor([32.0], dtype=dtype)) - one) == float(spacings[0]) == UNIT


class RoundedLogits:
    """A sampler and a learner with the same large logits, to which each adds errors of its own before it rounds them.

    error: standard deviation of these errors, in units. At 1, the logits of a model of some 30 layers differ so.
    """

    peak_memory = None

    def __init__(self, error: float, bias: Tensor | None = None) -> None:
        noise = torch.Generator().manual_seed(0)
        peaks = torch.tensor([0.0, 3.0, 8.0])[torch.randint(0, 3, (400,), generator=noise)]  # [P], flat to peaked
        exact = 12 + 2 * torch.randn(400, 1000, generator=noise)  # [P, V], up to 20 or so
        exact[:, 7] += peaks
        other = exact if bias is None else exact + bias
        self.sampler = (other + UNIT * error * torch.randn(exact.shape, generator=noise)).bfloat16().float()
        self.learner = (exact + UNIT * error * torch.randn(exact.shape, generator=noise)).bfloat16()
        self.noise = noise

    def load_adapter(self, version: int, weights: AdapterWeights) -> None:
        pass

    def close(self) -> None:
        pass

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        """Four responses of 100 tokens."""
        logprobs = torch.log_softmax(self.sampler, -1)  # [P, V]
        tokens = logprobs.argmax(-1)  # [P]
        if sampling.temperature:
            tokens = torch.multinomial(logprobs.exp(), 1, generator=self.noise).squeeze(1)
        drawn = logprobs.gather(1, tokens[:, None]).squeeze(1)
        rows = zip(requests, tokens.split(100), drawn.split(100), strict=True)
        return [Trajectory.from_tokens(request, ids.tolist(), values, True, 0) for request, ids, values in rows]

    def score(self, rows: Sequence[Trajectory], requested_roles: Collection[str]) -> list[RoleOutputs]:
        tokens = torch.tensor([row.response_ids for row in rows]).flatten()  # [P]
        logprobs = torch.log_softmax(self.learner.float(), -1).gather(1, tokens[:, None]).squeeze(1)
        behind, spacings = shortfalls(self.learner, tokens, head=lambda states: states)
        parts = zip(logprobs.split(100), behind.split(100), spacings.split(100), strict=True)
        nothing = torch.empty(0)
        return [RoleOutputs(own, own, nothing, 0.0, shortfalls=b, logit_spacings=s) for own, b, s in parts]


REQUESTS = [Request(f"prompt {i}", tuple(range(5 + i, 15 + i)), i) for i in range(4)]


@pytest.mark.parametrize("error", [0.0, 0.5, 1.0])
def test_rounding_of_logits_from_16_to_32_neither_stops_nor_warns(
    error: float, caplog: pytest.LogCaptureFixture
) -> None:
    engine = RoundedLogits(error)
    assert engine.learner.amax(-1).min() >= 16
    with caplog.at_level(logging.WARNING):
        unit = check_parity(engine, engine.score, REQUESTS, Sampling(1.0, 100))
        rows = engine.generate(REQUESTS, Sampling(1.0, 100))
        MismatchCheck(unit)(rows, engine.score(rows, ("policy",)))
    assert unit == pytest.approx(UNIT)
    assert not caplog.messages
    scored = engine.score(rows, ("policy",))
    assert float(sampler_mismatch(rows, scored).max()) > 0.1 or error == 0.0


def test_a_very_deep_model_is_warned_about_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    engine = RoundedLogits(error=3.0)
    with caplog.at_level(logging.WARNING):
        check_parity(engine, engine.score, REQUESTS, Sampling(1.0, 100))
    assert any("more than rounding usually explains" in message for message in caplog.messages)


def test_other_logits_stop_a_run_whatever_their_rounding() -> None:
    noise = torch.Generator().manual_seed(1)
    engine = RoundedLogits(error=0.5, bias=1.5 * torch.randn(400, 1000, generator=noise))
    with pytest.raises(SamplerMismatch, match=r"most at token \d+ of the response to 'prompt \d' \(\d"):
        check_parity(engine, engine.score, REQUESTS, Sampling(1.0, 100))


POLICY = PolicySettings(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def large_logits(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with so large an LM head that its largest logits are from 16 to 32."""
    folder = tmp_path_factory.mktemp("large-logits")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


class Sampled:
    """A learner and a pool on one base model, whose sampler may hold other weights."""

    def __init__(self, model: Path, dtype: str) -> None:
        settings = ModelSettings(path=str(model), dtype=dtype)
        self.roles: Roles = build_roles(Blueprint(settings, POLICY, 0, None), None, (SAMPLER_ROLE,)).eval()
        noise = torch.Generator().manual_seed(1)
        trunk = self.roles.trunk
        self.weights = {n: 0.15 * torch.randn(p.shape, generator=noise) for n, p in trunk.adapter("policy").items()}
        trunk.write_adapter("policy", self.weights)
        self.pool = LocalPool(TransformersEngine(trunk, frozenset({1}), max_num_seqs=8), 8)
        self.pool.load_adapter(0, self.weights)

    @torch.no_grad()
    def score(self, rows: Sequence[Trajectory], requested_roles: Collection[str]) -> list[RoleOutputs]:
        return score_microbatch(self.roles, rows, 1.0, torch.device("cpu"), requested_roles)

    def check(self) -> float:
        return check_parity(self.pool, self.score, REQUESTS, Sampling(1.0, 48))


DTYPES = ["float32", "bfloat16"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_weights_pass(dtype: str, large_logits: Path, caplog: pytest.LogCaptureFixture) -> None:
    sampled = Sampled(large_logits, dtype)
    with caplog.at_level(logging.WARNING):
        unit = sampled.check()
    assert unit > 0.05 or dtype == "float32"
    assert not caplog.messages
    rows = sampled.pool.generate(REQUESTS, Sampling(1.0, 48))
    MismatchCheck(unit)(rows, sampled.score(rows, ("policy",)))
    if dtype == "bfloat16":
        assert float(sampler_mismatch(rows, sampled.score(rows, ("policy",))).max()) > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_an_adapter_that_is_missing_or_scaled_stops_the_run(dtype: str, factor: float, large_logits: Path) -> None:
    sampled = Sampled(large_logits, dtype)
    scaled = {n: factor * w if ".lora_B." in n else w for n, w in sampled.weights.items()}
    sampled.pool.load_adapter(1, scaled)
    with pytest.raises(SamplerMismatch, match="different weights"):
        sampled.check()
    sampled.pool.load_adapter(2, sampled.weights)
    unit = sampled.check()
    sampled.pool.load_adapter(3, scaled)
    rows = sampled.pool.generate(REQUESTS, Sampling(1.0, 48))
    with pytest.raises(SamplerMismatch, match="not the one that is trained"):
        MismatchCheck(unit)(rows, sampled.score(rows, ("policy",)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_lm_head_stops_the_run(dtype: str, large_logits: Path) -> None:
    sampled = Sampled(large_logits, dtype)
    other = Sampled(large_logits, dtype)
    head = other.roles.trunk.causal.get_output_embeddings().weight
    with torch.no_grad():
        head.copy_(head[torch.randperm(len(head), generator=torch.Generator().manual_seed(0))])
    with pytest.raises(SamplerMismatch, match="likeliest token"):
        check_parity(other.pool, sampled.score, REQUESTS, Sampling(1.0, 48))
