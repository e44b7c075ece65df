"""Measures the frontier of reward against KL, and policies beside it, with the models of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from align.algorithms.episodes import shaped_score
from align.config.ppo_settings import PpoSettings
from align.config.schema import Experiment
from align.evaluation.distance import DrawnResponses, frontier_figures, policy_distance
from align.evaluation.policy import REFERENCE_VERSION, best_of_curve
from align.runtime.seeds import seed_for
from align.stages.policy_evaluation import LoadedReward
from policies.errors import UserError
from policies.trunk import AdapterWeights
from rollouts.engine import Sampling
from rollouts.trajectory import Request, RoleOutputs, Trajectory

TRAINED_VERSION = -2
"""The version of the trained policy in the pool while its responses show the frontier."""
MIN_POLICY_SAMPLES = 1024
"""Responses of a policy, over all prompts, at least."""


class DistanceStudy:
    """The frontier of a run's reward, estimated once, and policies that are compared with it."""

    def __init__(
        self,
        reward: LoadedReward,
        prompts: Sequence[Request],
        samples: int,
        trained: AdapterWeights,
        reference: DrawnResponses | None = None,
    ) -> None:
        """Sample the reference, unless its responses are known.

        Args:
            reward: The reward, whose trunk has adapters as wide as those of the policies.
            prompts: The held-out prompts.
            samples: Responses of the reference to each prompt; an even number.
            trained: The trained policy, as many of whose responses show the frontier where the reference's do not.
            reference: The reference's responses; None: they are sampled.
        """
        self.reward = reward
        self.prompts = prompts
        self.samples = samples
        self.trained = trained
        self.reference = reference or self._draw_reference()

    def frontier(self) -> dict[str, Any]:
        """The best policies and best-of-n of the reference, at each distance: `points` and `best_of`."""
        baseline = {name: float(values.mean()) for name, values in self.reference.kinds().items()}
        best_of = best_of_curve(self.reference.scores, self.reference.gold)
        return {
            "samples": self.samples,
            "prompts": len(self.prompts),
            "points": frontier_figures(self.reference),
            "best_of": [_gains(figures, baseline) for figures in best_of[1:]],
        }

    def compare(self, version: int, policy: AdapterWeights) -> dict[str, Any]:
        """The figures of a policy (see `policy_distance`), which the pool loads under a version of its own, from 0."""
        count = -(-MIN_POLICY_SAMPLES // len(self.prompts))
        return policy_distance(self._draw_policy(version, policy, count), self.reference, lambda: self._further)

    @cached_property
    def _further(self) -> DrawnResponses:
        """Many responses of the trained policy."""
        return self._draw_policy(TRAINED_VERSION, self.trained, self.samples)

    def _draw_reference(self) -> DrawnResponses:
        self.reward.pool.load_adapter(REFERENCE_VERSION, self.reward.reference)
        return self._draw(self.samples, ("reward",), "reference")

    def _draw_policy(self, version: int, policy: AdapterWeights, count: int) -> DrawnResponses:
        self.reward.roles.trunk.write_adapter("policy", policy)
        self.reward.pool.load_adapter(version, policy)
        return self._draw(count, ("policy", "reference", "reward"), "policy")

    def _draw(self, count: int, roles: Sequence[str], purpose: str) -> DrawnResponses:
        """Sample and score what the pool holds, one response per prompt at a time."""
        rows: dict[str, list[list[float]]] = {}
        for draw in range(count):
            for name, values in self._draw_once(self._requests(purpose, draw), roles).items():
                rows.setdefault(name, []).append(values)
        return DrawnResponses(**{name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()})

    def _draw_once(self, requests: Sequence[Request], roles: Sequence[str]) -> dict[str, list[float]]:
        """One response per request: `scores`, and where they are asked for `gold` and `log_ratios`."""
        experiment = self.reward.experiment
        scorers = self.reward.scorers
        sampling = Sampling(experiment.rollouts.temperature, experiment.rollouts.max_new_tokens)
        trajectories = self.reward.pool.generate(requests, sampling)
        outputs = scorers.evaluation_scorer(self.reward.score_roles, roles)(trajectories)()
        values = {
            "scores": [_shaped(t, output, experiment.ppo) for t, output in zip(trajectories, outputs, strict=True)]
        }
        if scorers.gold is not None:
            values["gold"] = list(scorers.gold(trajectories))
        if "policy" in roles:
            values["log_ratios"] = [output.kl for output in outputs]
        return values

    def _requests(self, purpose: str, draw: int) -> list[Request]:
        seed = self.reward.experiment.evaluation.seed
        return [
            replace(prompt, seed=seed_for(seed, "frontier", purpose, index, draw))
            for index, prompt in enumerate(self.prompts)
        ]


def _shaped(trajectory: Trajectory, outputs: RoleOutputs, ppo: PpoSettings) -> float:
    return shaped_score(outputs.score, trajectory.sampled_length, truncated=not trajectory.ended, ppo=ppo)


def _gains(figures: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
    """Best-of-n's means as gains over the reference."""
    gains = {f"{name}_gain": figures[f"{name}_mean"] - mean for name, mean in baseline.items()}
    return {"n": figures["n"], "kl": figures["kl"]} | gains


def check_has_frontier(experiment: Experiment, is_stateful: bool) -> None:
    """Raise UserError where no policy is the best one, because the reward is not a fixed function of the response."""
    if is_stateful:
        raise UserError(
            "--frontier: the reward changes while the policy learns (running moments, or a constraint), so that no "
            "policy is the best one"
        )
    if experiment.ppo.on_truncation == "bootstrap" and "ppo" in experiment.stages:
        raise UserError(
            "--frontier: with `ppo.on_truncation: bootstrap` truncated responses have no score, so that no policy is "
            "the best one"
        )
