"""Where all responses to a prompt score alike, a group estimator learns from the KL alone, and not from its noise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.algorithms.episodes import make_episodes
from align.config.ppo_settings import PpoSettings
from align.config.schema import LearnerSettings
from align.ppo.learners import local_learners
from align.ppo.loop import step_coefficients
from align.ppo.metrics import zero_std_share
from align.ppo.prompts import minibatch_orders
from align.roles.build import Blueprint, build_roles
from policies.schema import ModelSettings, PolicySettings
from rollouts.engine import Sampling
from rollouts.trajectory import Request, RoleOutputs, Trajectory
from rollouts.transformers_engine import SAMPLER_ROLE, TransformersEngine

POLICY = PolicySettings(rank=4, alpha=8.0)
BATCH = {"batch_size": 16, "samples_per_prompt": 4, "minibatches": 2, "epochs": 2}
PROMPT = (20, 31, 42, 53)


def update(model: Path, ppo: PpoSettings) -> dict[str, float]:
    """One step on prompts that the policy cannot solve yet: every score is 0. The policy is near its reference."""
    roles = build_roles(Blueprint(ModelSettings(path=str(model)), POLICY, 0, None), None, (SAMPLER_ROLE,))
    noise = torch.Generator().manual_seed(0)
    weights = roles.trunk.read_adapter("policy")
    roles.trunk.write_adapter(
        "policy", {n: w + 0.02 * torch.randn(w.shape, generator=noise) for n, w in weights.items()}
    )
    engine = TransformersEngine(roles.trunk, frozenset({1}), max_num_seqs=16)
    engine.load_adapter(0, roles.trunk.read_adapter("policy"))
    requests = [Request("", (*PROMPT, 60 + i // 4), i) for i in range(16)]
    trajectories = engine.generate(requests, Sampling(1.0, 24))
    learners = local_learners(roles, ppo, LearnerSettings(), 1.0, False)
    scored = [replace(outputs, score=0.0) for outputs in learners.score(trajectories)]
    assert max(float((o.logprobs - o.reference_logprobs).abs().max()) for o in scored) > 0.01
    coefficient = ppo.kl.coefficient
    episodes = make_episodes(trajectories, scored, ppo, coefficient)
    coefficients = step_coefficients(LearnerSettings(), ppo, 0, coefficient)
    statistics = learners.update(episodes, minibatch_orders(ppo, 0, 0), coefficients)
    learners.close()
    return statistics


def test_grpo_takes_hardly_a_step_where_every_response_scores_zero(tiny_model: Path) -> None:
    by_default = update(tiny_model, PpoSettings(estimator="grpo", **BATCH))
    assert by_default["policy_gradient_norm"] < 0.02
    assert by_default["policy_clipped"] == 0
    in_reward = update(tiny_model, PpoSettings(estimator="grpo", kl={"where": "reward", "estimator": "k1"}, **BATCH))
    assert in_reward["policy_gradient_norm"] > 20 * by_default["policy_gradient_norm"]


def outputs(score: float, length: int = 2) -> tuple[Trajectory, RoleOutputs]:
    zeros = torch.zeros(length)
    row = Trajectory.from_tokens(Request("", (5,), 0), tuple(range(length)), zeros, True, 0)
    return row, RoleOutputs(zeros, zeros, torch.empty(0), score)


@pytest.mark.parametrize(
    ("scores", "settings", "share"),
    [
        ([0, 0, 0, 0], {}, 1.0),
        ([0, 0, 0, 1], {}, 0.5),
        ([0.1, 0.1 * (1 + 6e-8), 2, 3], {}, 0.5),
        ([0, 0, 0, 0], {"length_penalty": 0.1}, 0.5),
    ],
)
def test_the_share_of_prompts_whose_responses_score_alike(
    scores: list[float], settings: dict[str, Any], share: float
) -> None:
    ppo = PpoSettings(estimator="rloo", batch_size=4, samples_per_prompt=2, **settings)
    pairs = [outputs(score, length) for score, length in zip(scores, (2, 2, 2, 3))]
    assert zero_std_share([row for row, _ in pairs], [output for _, output in pairs], ppo) == share
