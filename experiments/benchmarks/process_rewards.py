"""Episodes that PPO needs with rewards at every step and with one reward at the end, on a chain of choices.

    python experiments/benchmarks/process_rewards.py

A response has 16 tokens, each one of 8 actions, of which one is right; every right token is worth 1/16, so that the
best total is 1. The reward is either given token by token or as a whole on the last token: the totals are equal. The
policy is a table of logits, one row per token. Advantages and losses are those of `align`: REINFORCE++, without a
critic. Both rewards are learned with each of several learning rates and discounts, and the best pair counts for each.
"""

import argparse
import json
import math
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from align.algorithms.episodes import make_episodes
from align.algorithms.losses import clipped_surrogate
from align.config.ppo_settings import PpoSettings
from rollouts.trajectory import Request, RoleOutputs, Trajectory

TOKENS = 16
ACTIONS = 8
EPISODES = 32
"""Episodes per update."""
GOAL = 0.95
"""Share of the best total that counts as learned."""
MOST_EPISODES = 4_000
"""Episodes after which a run is given up."""
LEARNING_RATES = (0.1, 0.2, 0.4, 0.6, 1.0)
GAMMAS = (0.5, 0.9, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args()
    best: dict[str, float] = {}
    for reward in ("outcome", "steps"):
        for gamma in GAMMAS:
            for rate in LEARNING_RATES:
                episodes = median_episodes(reward == "steps", rate, gamma, arguments.seeds)
                best[reward] = min(best.get(reward, math.inf), episodes)
                row = {"reward": reward, "gamma": gamma, "learning_rate": rate, "episodes": shown(episodes)}
                print(json.dumps(row), flush=True)
    print(json.dumps({"best": {reward: shown(episodes) for reward, episodes in best.items()}}))


def shown(episodes: float) -> float | None:
    """A number of episodes; None where the goal was not reached."""
    return episodes if math.isfinite(episodes) else None


def median_episodes(steps: bool, learning_rate: float, gamma: float, seeds: int) -> float:
    """Median over the seeds of the episodes until the goal."""
    return median(episodes_to_goal(steps, learning_rate, gamma, seed) for seed in range(seeds))


def episodes_to_goal(steps: bool, learning_rate: float, gamma: float, seed: int) -> float:
    """Episodes until the expected total of the policy is `GOAL`; infinite where `MOST_EPISODES` do not suffice."""
    ppo = PpoSettings(estimator="reinforce++", gamma=gamma)
    random = torch.Generator().manual_seed(seed)
    right = torch.randint(ACTIONS, (TOKENS,), generator=random)
    logits = torch.zeros(TOKENS, ACTIONS, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=learning_rate)
    for update in range(MOST_EPISODES // EPISODES):
        logprobs = logits.log_softmax(-1)  # [T, A]
        if float(logprobs.detach().exp()[range(TOKENS), right].mean()) >= GOAL:
            return update * EPISODES
        actions = torch.multinomial(logprobs.detach().exp(), EPISODES, replacement=True, generator=random).T  # [B, T]
        chosen = logprobs.gather(1, actions.T).T  # [B, T]
        rewards = (actions == right).float() / TOKENS  # [B, T]
        advantages = estimate(actions, chosen.detach(), rewards, steps, ppo)
        losses, _ = clipped_surrogate(chosen.flatten(), chosen.detach().flatten(), advantages.flatten(), ppo)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    return math.inf


def estimate(actions: Tensor, logprobs: Tensor, rewards: Tensor, steps: bool, ppo: PpoSettings) -> Tensor:
    """The advantages of a batch, `[B, T]`, as PPO computes them.

    Args:
        actions: `[B, T]`.
        logprobs: `[B, T]`, in nats.
        rewards: `[B, T]`, the worth of each token.
        steps: Whether each token gets its worth as a reward; otherwise the last one gets the sum.
        ppo: The settings of PPO.
    """
    trajectories: list[Trajectory] = []
    scored: list[RoleOutputs] = []
    tokens: Sequence[Sequence[int]] = actions.tolist()
    for response, response_logprobs, response_rewards in zip(tokens, logprobs, rewards, strict=True):
        request = Request("", (0,), 0)
        trajectories.append(Trajectory.from_tokens(request, response, response_logprobs, ended=True, version=0))
        outputs = RoleOutputs(
            logprobs=response_logprobs,
            reference_logprobs=response_logprobs,
            values=torch.empty(0),
            score=float(response_rewards.double().sum()),
            step_rewards=response_rewards if steps else None,
        )
        scored.append(outputs)
    episodes = make_episodes(trajectories, scored, ppo, coefficient=0.0)
    return torch.stack([episode.advantages for episode in episodes])


if __name__ == "__main__":
    main()
