from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
import torch

from align.ppo.mismatch import SamplerMismatch, check_mismatch, check_parity, sampler_mismatch
from policies.trunk import AdapterWeights
from rollouts.engine import Sampling
from rollouts.trajectory import Request, RoleOutputs, Trajectory


def pair(sampler: list[float], learner: list[float]) -> tuple[Trajectory, RoleOutputs]:
    row = Trajectory.from_tokens(Request("", (1,), 0), tuple(range(len(sampler))), torch.tensor(sampler), True, 0)
    return row, RoleOutputs(torch.tensor(learner), torch.zeros(len(learner)), torch.empty(0), 0.0)


PAIRS = [pair([-1.0, -2.0], [-1.5, -2.0]), pair([-3.0], [-2.5])]
TRAJECTORIES = [trajectory for trajectory, _ in PAIRS]
OUTPUTS = [outputs for _, outputs in PAIRS]


def test_mismatch_is_the_difference_at_every_token() -> None:
    assert sampler_mismatch(TRAJECTORIES, OUTPUTS).tolist() == [0.5, 0.0, 0.5]


def test_a_mean_mismatch_over_the_limit_ends_the_run() -> None:
    check_mismatch(TRAJECTORIES, OUTPUTS, None)
    check_mismatch(TRAJECTORIES, OUTPUTS, 0.34)
    with pytest.raises(SamplerMismatch, match=r"0\.333 nats per token.*max_mismatch is 0\.3"):
        check_mismatch(TRAJECTORIES, OUTPUTS, 0.3)


def test_a_mismatch_that_is_not_a_number_ends_the_run() -> None:
    row, output = pair([-1.0], [float("nan")])
    with pytest.raises(SamplerMismatch):
        check_mismatch([row], [output], 0.3)


class PreparedPool:
    """A pool that returns prepared responses."""

    def load_adapter(self, version: int, weights: AdapterWeights) -> None:
        pass

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        return [replace(row, request=request) for row, request in zip(TRAJECTORIES, requests, strict=True)]

    def close(self) -> None:
        pass


def test_a_sampler_with_other_weights_is_detected_before_the_first_update() -> None:
    requests = [Request("Why?", (1,), 0), Request("How?", (1,), 0)]

    def same(rows: Sequence[Trajectory], requested_roles: Collection[str]) -> list[RoleOutputs]:
        outputs = [pair([], row.sampler_logprobs.tolist())[1] for row in rows]
        return [replace(output, shortfalls=torch.zeros(len(output.logprobs))) for output in outputs]

    def greedy(rows: Sequence[Trajectory], requested_roles: Collection[str]) -> list[RoleOutputs]:
        return [replace(OUTPUTS[0], shortfalls=torch.tensor([0.0, 0.01]))]

    def other(rows: Sequence[Trajectory], requested_roles: Collection[str]) -> list[RoleOutputs]:
        return [replace(OUTPUTS[0], shortfalls=torch.tensor([0.0, 0.3]))]

    check_parity(PreparedPool(), same, requests, Sampling(1.0, 2))
    with pytest.raises(
        SamplerMismatch, match=r"to 'Why\?' differ .* by 0\.25 nats per token .* most at token 1 \(0\.5\)"
    ):
        check_parity(PreparedPool(), greedy, requests, Sampling(1.0, 2))
    with pytest.raises(SamplerMismatch, match=r"greedy response to 'Why\?' .* token 2 is 0\.3 nats less likely"):
        check_parity(PreparedPool(), other, requests, Sampling(1.0, 2))
