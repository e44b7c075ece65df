"""PPO, RLOO, GRPO and REINFORCE++ on problems whose best and worst policies are known."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.algorithms.kl import FixedKl
from align.config.ppo_settings import PpoSettings
from align.config.schema import LearnerSettings
from align.ppo.learners import local_learners
from align.ppo.loop import Ppo
from align.ppo.mismatch import MismatchCheck
from align.ppo.prompts import PromptStream
from align.roles.build import Blueprint, build_roles
from policies.schema import ModelSettings, PolicySettings, Schedule
from rollouts.async_rollouts import SynchronousRollouts
from rollouts.engine import Sampling
from rollouts.pool import LocalPool
from rollouts.trajectory import Request, RoleOutputs, Trajectory
from rollouts.transformers_engine import SAMPLER_ROLE, TransformersEngine

Reward = Callable[[Trajectory], float]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama of a few tokens, so that every one is tried."""
    folder = tmp_path_factory.mktemp("few-tokens")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


NO_STOP: frozenset[int] = frozenset()


TOKENS = 12


def bandit(trajectory: Trajectory) -> float:
    """One token, one of twelve arms: one pays 1, one pays 0, the others a half."""
    return {7: 1.0, 4: 0.0}.get(trajectory.response_ids[0], 0.5)


def chain(trajectory: Trajectory) -> float:
    """Share of the tokens whose class, of three, follows that of the token before: what is best hangs on the state."""
    tokens = (trajectory.request.prompt_ids[-1], *trajectory.response_ids)
    return mean((after - before) % 3 == 1 for before, after in pairwise(tokens))


def learned(model: Path, estimator: str, reward: Reward, length: int, steps: int, schedule: Schedule) -> float:
    """Mean reward of the last steps' episodes."""
    ppo = PpoSettings(
        steps=steps,
        batch_size=128,
        samples_per_prompt=4,
        epochs=4,
        minibatches=4,
        estimator=estimator,
        entropy_coefficient=0.003,
    )
    learner = LearnerSettings(policy_learning_rate=6e-3, critic_learning_rate=6e-3, schedule=schedule)
    blueprint = Blueprint(ModelSettings(path=str(model)), PolicySettings(rank=8, alpha=16), 0, None)
    roles = build_roles(blueprint, ppo.active_critic, (SAMPLER_ROLE,))
    learners = local_learners(roles, ppo, learner, 1.0, False)

    def score(trajectories: Sequence[Trajectory]) -> list[RoleOutputs]:
        outputs = zip(trajectories, learners.score(trajectories), strict=True)
        return [replace(output, score=reward(trajectory)) for trajectory, output in outputs]

    loop = Ppo(
        prompts=PromptStream(
            [Request("", (token,), 0) for token in range(TOKENS)], ppo.batch_size, ppo.samples_per_prompt, 0
        ),
        rollouts=SynchronousRollouts(
            LocalPool(TransformersEngine(roles.trunk, NO_STOP, max_num_seqs=ppo.batch_size), ppo.batch_size)
        ),
        learners=learners,
        score=score,
        kl=FixedKl(0.0),
        mismatch=MismatchCheck(logit_spacing=1e-3),
        sampling=Sampling(1.0, length),
        ppo=ppo,
        learner=learner,
        seed=0,
    )
    try:
        scores = [mean(output.score for output in step.scored) for step in loop.steps()]
    finally:
        learners.close()
    return mean(scores[-3:])


@pytest.mark.parametrize(
    "estimator",
    [
        "gae",
        "grpo",
        pytest.param("rloo", marks=pytest.mark.slow),
        pytest.param("reinforce++", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("reward", "length", "steps", "schedule"),
    [(bandit, 1, 30, "constant"), pytest.param(chain, 4, 70, "linear", marks=pytest.mark.slow)],
)
def test_finds_the_best_policy_and_with_the_sign_turned_the_worst(
    model: Path, estimator: str, reward: Reward, length: int, steps: int, schedule: Schedule
) -> None:
    assert learned(model, estimator, reward, length, steps, schedule) >= 0.95
    assert -learned(model, estimator, lambda t: -reward(t), length, steps, schedule) <= 0.05
