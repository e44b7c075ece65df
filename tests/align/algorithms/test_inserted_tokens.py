"""Responses with tokens that the policy has not sampled have the episodes of the policy's tokens alone."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.algorithms.episodes import Episode, make_episodes
from align.config.ppo_settings import KlSettings, PpoSettings
from rollouts.trajectory import Request, RoleOutputs, Trajectory, policy_mask

SETTINGS: dict[str, dict[str, Any]] = {
    "gae": {"gamma": 0.9, "gae_lambda": 0.8, "whiten_rewards": True, "on_truncation": "bootstrap"},
    "rloo": {"samples_per_prompt": 2, "length_penalty": 0.1},
    "grpo": {"samples_per_prompt": 2, "loss_aggregation": "sequence_mean", "truncation_penalty": 0.5},
    "reinforce++": {"gamma": 0.7, "loss_aggregation": "sequence_mean"},
}
COUNT = 4
"""Responses of a batch: two to each of two prompts."""


@dataclass
class Drawn:
    """A response of the policy's tokens alone, and the same with others in it."""

    alone: tuple[Trajectory, RoleOutputs]
    among: tuple[Trajectory, RoleOutputs]

    @property
    def mask(self) -> Tensor:
        trajectory, _ = self.among
        return policy_mask(trajectory.length, trajectory.inserted)


def respond(seed: int, turns: list[tuple[int, int]], has_critic: bool) -> Drawn:
    """A response in turns, each of some tokens by the policy and then, but for the last turn, some others."""
    noise = torch.Generator().manual_seed(seed)
    of_policy: list[bool] = []
    for sampled, others in turns:
        of_policy += [True] * sampled + [False] * others
    of_policy = of_policy[: len(of_policy) - turns[-1][1]]  # the policy has the last word
    mask = torch.tensor(of_policy)
    length = len(mask)
    tokens = torch.randint(0, 99, (length,), generator=noise)
    logprobs, reference, sampler, steps = -torch.rand(4, length, generator=noise)
    values = torch.randn(length + 1, generator=noise) if has_critic else torch.empty(0)
    steps = steps * mask
    alone = Trajectory(
        request=Request("p", (1,), 0),
        response_ids=tuple(tokens[mask].tolist()),
        sampler_logprobs=sampler[mask],
        ended=seed % 3 > 0,
        versions=(0,) * sum(of_policy),
    )
    outputs = RoleOutputs(
        logprobs=logprobs[mask],
        reference_logprobs=reference[mask],
        values=values[torch.cat([mask, torch.tensor([True])])] if has_critic else values,
        score=float(steps.sum()) + 0.5 * (seed % 5),
        step_rewards=steps[mask],
    )
    edges = torch.tensor([0, *(~mask).int().tolist(), 0]).diff()
    starts = (edges == 1).nonzero().flatten().tolist()
    ends = (edges == -1).nonzero().flatten().tolist()
    among = replace(
        alone,
        response_ids=tuple(tokens.tolist()),
        sampler_logprobs=sampler,
        versions=(0,) * length,
        inserted=tuple(zip(starts, ends, strict=True)),
    )
    outputs_of_all = replace(
        outputs, logprobs=logprobs, reference_logprobs=reference, values=values, step_rewards=steps
    )
    return Drawn((alone, outputs), (among, outputs_of_all))


TURNS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3)


def episodes_of(pairs: list[tuple[Trajectory, RoleOutputs]], ppo: PpoSettings) -> list[Episode]:
    return make_episodes([pair[0] for pair in pairs], [pair[1] for pair in pairs], ppo, coefficient=0.2)


@pytest.mark.parametrize("name", SETTINGS)
@given(seed=st.integers(0, 999), turns=st.lists(TURNS, min_size=COUNT, max_size=COUNT))
def test_inserted_tokens_change_no_advantage_return_or_weight(
    name: str, seed: int, turns: list[list[tuple[int, int]]]
) -> None:
    has_critic = name == "gae"
    kl = KlSettings(where="reward", estimator="k3")
    ppo = PpoSettings.model_validate(
        {"estimator": name, "batch_size": COUNT, "importance_ratio_cap": 1.5, "kl": kl, **SETTINGS[name]}
    )
    drawn = [respond(seed + i, turns[i], has_critic) for i in range(COUNT)]
    alone = episodes_of([response.alone for response in drawn], ppo)
    among = episodes_of([response.among for response in drawn], ppo)
    for response, expected, episode in zip(drawn, alone, among, strict=True):
        mask = response.mask
        assert torch.equal(episode.advantages[mask], expected.advantages)
        assert not episode.advantages[~mask].any()
        assert torch.equal(episode.token_weights[mask], expected.token_weights)
        assert not episode.token_weights[~mask].any()
        assert episode.total_weight == pytest.approx(expected.total_weight)
        assert episode.total_weight == pytest.approx(float(episode.token_weights.double().sum()))
        if has_critic:
            assert torch.equal(episode.returns[mask], expected.returns)
            assert torch.equal(episode.of_policy(episode.old_values), expected.old_values)


def test_a_continued_response_knows_which_tokens_are_the_policys() -> None:
    first = Trajectory.from_tokens(Request("p", (1,), 0), (7, 8), torch.tensor([-1.0, -2.0]), True, version=3)
    waiting = first.with_inserted((9, 9, 9))
    assert (waiting.ended, waiting.versions, waiting.inserted) == (False, (3, 3, 3, 3, 3), ((2, 5),))
    request = replace(first.request, partial_response=waiting)
    whole = Trajectory.from_tokens(request, (5,), torch.tensor([-0.5]), True, version=3).with_inserted((6,))
    assert whole.response_ids == (7, 8, 9, 9, 9, 5, 6)
    assert whole.inserted == ((2, 5), (6, 7))
    assert whole.sampled_length == 3
    assert whole.of_policy(whole.sampler_logprobs).tolist() == [-1.0, -2.0, -0.5]
    assert whole.request is first.request
