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


ROWS, VERDICTS = zip(pair([-1.0, -2.0], [-1.5, -2.0]), pair([-3.0], [-2.5]))


def test_gaps_are_the_distances_of_every_token() -> None:
    assert sampler_mismatch(ROWS, VERDICTS).tolist() == [0.5, 0.0, 0.5]


def test_a_mean_gap_past_the_limit_ends_the_run() -> None:
    check_mismatch(ROWS, VERDICTS, None)
    check_mismatch(ROWS, VERDICTS, 0.34)
    with pytest.raises(SamplerMismatch, match=r"0\.333 nats a token.*max_mismatch is 0\.3"):
        check_mismatch(ROWS, VERDICTS, 0.3)


def test_a_gap_that_is_not_a_number_ends_the_run() -> None:
    row, output = pair([-1.0], [float("nan")])
    with pytest.raises(SamplerMismatch):
        check_mismatch([row], [output], 0.3)


class Recorded:
    """A pool that answers what it was given."""

    def load_adapter(self, version: int, weights: AdapterWeights) -> None:
        pass

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        return [replace(row, request=request) for row, request in zip(ROWS, requests, strict=True)]

    def close(self) -> None:
        pass


def test_other_weights_than_the_learners_are_found_before_the_first_update() -> None:
    requests = [Request("Why?", (1,), 0), Request("How?", (1,), 0)]

    def same(rows: Sequence[Trajectory], requested_roles: Collection[str]) -> list[RoleOutputs]:
        outputs = [pair([], row.sampler_logprobs.tolist())[1] for row in rows]
        return [replace(output, shortfalls=torch.zeros(len(output.logprobs))) for output in outputs]

    def greedy(rows: Sequence[Trajectory], requested_roles: Collection[str]) -> list[RoleOutputs]:
        return [replace(VERDICTS[0], shortfalls=torch.tensor([0.0, 0.01]))]

    def other(rows: Sequence[Trajectory], requested_roles: Collection[str]) -> list[RoleOutputs]:
        return [replace(VERDICTS[0], shortfalls=torch.tensor([0.0, 0.3]))]

    check_parity(Recorded(), same, requests, Sampling(1.0, 2))
    with pytest.raises(SamplerMismatch, match=r"to 'Why\?' are 0\.25 nats a token .* most at token 1 \(0\.5\)"):
        check_parity(Recorded(), greedy, requests, Sampling(1.0, 2))
    with pytest.raises(SamplerMismatch, match=r"greedy response to 'Why\?' .* token 2 is 0\.3 nats less likely"):
        check_parity(Recorded(), other, requests, Sampling(1.0, 2))
