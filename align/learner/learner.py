"""One rank of the learner: a DeepSpeed engine around the policy and the critic on one base model."""

import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from align.algorithms.episodes import Episode
from align.algorithms.losses import load_policy_loss
from align.config.ppo_settings import PpoSettings
from align.config.schema import LearnerSettings
from align.data.examples import TokenizedDemonstration
from align.learner.engine import make_deepspeed_engine
from align.learner.objective import (
    STATISTICS,
    MicrobatchObjective,
    collate_episodes,
    collate_ptx_batch,
    likelihood_objective,
    ppo_objectives,
    summed,
)
from align.learner.optimizer import RoleClip, make_optimizer, role_of_group
from align.learner.state import LearnerState, RankState
from align.roles.roles import Roles
from align.roles.scoring import ALL_ROLES, score_microbatches
from policies.trunk import AdapterWeights
from rollouts.trajectory import RoleOutputs, Trajectory

AnyExample = TypeVar("AnyExample", Episode, TokenizedDemonstration)

MinibatchOrders = Sequence[Sequence[Sequence[int]]]
"""For each epoch, for each minibatch, the indices of its episodes."""

DemonstrationBatches = Sequence[Sequence[TokenizedDemonstration]]
"""For each optimizer step, the demonstrations that are mixed into it; empty without ptx."""

TRAINED_ROLES = ("policy", "critic")
"""The roles that an update trains, each with its own learning rate and gradient norm."""


@dataclass(frozen=True)
class StepCoefficients:
    """The coefficients of one PPO step.

    Attributes:
        policy_lr: Learning rate of the policy.
        critic_lr: Learning rate of the critic.
        kl_in_loss: Weight of the KL in the loss; 0 where the KL is in the reward.
    """

    policy_lr: float
    critic_lr: float
    kl_in_loss: float


@dataclass(frozen=True)
class MinibatchResult:
    """The measurements of one optimizer step.

    Attributes:
        sums: `[7]` float64, on the CPU: the `STATISTICS`, summed over the tokens of all ranks.
        weight: Divisor that turns the sums into means.
        ptx_loss: Loss of the demonstrations, in nats per token; 0 without any.
        norms: Gradient norms of the roles before clipping.
    """

    sums: Tensor
    weight: float
    ptx_loss: float
    norms: dict[str, float]

    @property
    def approximate_kl(self) -> float:
        """KL of the old policy to the new one, in nats per token."""
        return float(self.sums[STATISTICS.index("approximate_kl")]) / self.weight


class Learner:
    """Scores trajectories and updates the policy and the critic.

    All ranks make the same calls in the same order. `score` takes this rank's trajectories, `update` all episodes.
    """

    def __init__(
        self, roles: Roles, ppo: PpoSettings, learner: LearnerSettings, temperature: float, gradient_checkpointing: bool
    ) -> None:
        """Build the optimizer and the engine around the roles. The default process group must exist.

        Args:
            roles: The modules that are trained and that score.
            ppo: The settings of PPO.
            learner: The settings of the learner.
            temperature: Sampling temperature, by which logits are divided.
            gradient_checkpointing: Whether the backward pass recomputes activations.
        """
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.ppo = ppo
        self.settings = learner
        self.temperature = temperature
        self.policy_loss = load_policy_loss(ppo.policy_loss)
        groups, factors = roles.groups()
        sizes = []  # read before ZeRO 3 partitions the parameters
        for parameters in groups.values():
            sizes.append([parameter.numel() for parameter in parameters])
        self.optimizer = make_optimizer(learner, groups, factors)
        if learner.zero == 3:
            for trunk in roles.trunks:
                trunk.use_module_forwards()
        self.clip = RoleClip(learner.max_grad_norm)
        self.engine = make_deepspeed_engine(roles, self.optimizer, learner.zero, self.clip)
        self.device: torch.device = self.engine.device
        self.roles = roles.eval()
        self.rank_state = RankState(roles, sizes, self.engine, self.optimizer, learner.zero)
        if gradient_checkpointing:
            for trunk in roles.trunks:
                trunk.enable_gradient_checkpointing()
        self._skips_seen = 0

    @torch.no_grad()
    def score(
        self, trajectories: Sequence[Trajectory], requested_roles: Collection[str] = ALL_ROLES
    ) -> list[RoleOutputs]:
        """Compute the outputs of the requested roles.

        Args:
            trajectories: This rank's trajectories, at least one.
            requested_roles: Some of `ALL_ROLES` and `GREEDY`, see `align.roles.scoring`.

        Returns:
            One record per trajectory, in the same order. The score is NaN without a reward head.
        """
        lengths = [trajectory.total_length for trajectory in trajectories]
        microbatches = self._same_count_on_all_ranks(self._microbatches(lengths))
        return score_microbatches(
            run=self.engine,
            trajectories=trajectories,
            microbatches=microbatches,
            temperature=self.temperature,
            device=self.device,
            requested_roles=requested_roles,
        )

    def update(
        self,
        episodes: Sequence[Episode],
        orders: MinibatchOrders,
        coefficients: StepCoefficients,
        demonstrations: DemonstrationBatches = (),
    ) -> dict[str, float]:
        """Train on all episodes of a step.

        It ends early, after an optimizer step, once the approximate KL per token exceeds `ppo.target_kl`.

        Args:
            episodes: All episodes of the step.
            orders: For each epoch, for each minibatch, the indices of its episodes.
            coefficients: Learning rates and the weight of the KL in the loss.
            demonstrations: The demonstrations that are mixed into each optimizer step; empty without ptx.

        Returns:
            Means over the tokens that were trained on (`STATISTICS`), `ptx_loss`, `optimizer_steps`, `skipped_steps`,
            and `policy_gradient_norm` and `critic_gradient_norm`: the same on every rank.
        """
        self._set_learning_rates(coefficients)
        skipped_before = self.clip.skipped
        results: list[MinibatchResult] = []
        minibatches = chain.from_iterable(orders)
        for indices, mixed_in in zip_longest(minibatches, demonstrations, fillvalue=()):
            minibatch = [episodes[i] for i in indices]
            result = self._train_minibatch(minibatch, mixed_in, coefficients.kl_in_loss)
            results.append(result)
            if self.ppo.target_kl is not None and result.approximate_kl > self.ppo.target_kl:
                break
        skipped = self.clip.skipped - skipped_before + self._skipped_by_deepspeed()
        return _mean_statistics(results) | {"skipped_steps": skipped}

    def policy_weights(self) -> AdapterWeights:
        """A complete copy of the policy's adapter, on the CPU."""
        return self.rank_state.policy_weights()

    def state(self) -> LearnerState:
        """A copy of everything that updates change, on the CPU; of the optimizer's state, this rank's part."""
        return self.rank_state.state()

    def restore(self, states: Sequence[LearnerState], zero: int) -> None:
        """Restore the states that the ranks saved at this ZeRO stage; see `RankState.restore`."""
        self.rank_state.restore(states, zero)

    def close(self) -> None:
        """Destroy the engine; without this, ZeRO 3 aborts at exit."""
        self.engine.destroy()
        os.environ.pop("LOCAL_RANK", None)

    def _train_minibatch(
        self, minibatch: Sequence[Episode], demonstrations: Sequence[TokenizedDemonstration], kl_in_loss: float
    ) -> MinibatchResult:
        """Take one optimizer step."""
        weight = math.fsum(episode.weight * len(episode.response_ids) for episode in minibatch)
        objectives = ppo_objectives(self.roles, self.ppo, self.policy_loss, self.temperature, kl_in_loss)
        if self.settings.zero == 3:
            # DeepSpeed expects the first backward pass of a step to reach every trained parameter.
            objectives = [summed(objectives)]
        sums = self._backward(minibatch, weight, objectives, partial(collate_episodes, device=self.device))
        ptx_loss = self._backward_demonstrations(demonstrations) if demonstrations else 0.0
        self.engine.step()
        return MinibatchResult(sums, weight, ptx_loss, norms=dict(self.clip.norms))

    def _backward_demonstrations(self, demonstrations: Sequence[TokenizedDemonstration]) -> float:
        """Accumulate the gradient of the demonstrations. Returns their loss in nats per token."""
        tokens = sum(demonstration.trained_tokens for demonstration in demonstrations)
        weight = tokens / self.ppo.ptx_coefficient
        collate = partial(collate_ptx_batch, device=self.device)
        return float(self._backward(demonstrations, weight, [likelihood_objective], collate)) / tokens

    def _backward(
        self,
        examples: Sequence[AnyExample],
        weight: float,
        objectives: Sequence[MicrobatchObjective],
        collate: Callable[[Sequence[AnyExample]], tuple[Any, ...]],
    ) -> Tensor:
        """Accumulate the gradient of this rank's share of the examples.

        Args:
            examples: The examples of all ranks.
            weight: Divisor of the summed losses of all examples.
            objectives: The objectives, which are differentiated one after another.
            collate: Turns examples into the tensors of a microbatch that an objective takes.

        Returns:
            The statistics of the objectives, `[7]` or `[]` float64, summed over microbatches and ranks, on the CPU.
        """
        by_length = sorted(examples, key=lambda example: example.length)
        share = range(self.rank, len(by_length), self.world_size)
        microbatches = []
        for positions in self._microbatches([by_length[i].length for i in share]):
            microbatches.append([share[position] for position in positions])
        parts = []
        for number, indices in enumerate(self._same_count_on_all_ranks(microbatches)):
            tensors = collate([by_length[i] for i in indices])
            # Fillers keep this rank in step with the others; their weight is 0.
            is_filler = number >= len(microbatches)
            # DeepSpeed averages over ranks, and the loss is a mean over the tokens of all ranks.
            scale = 0.0 if is_filler else self.world_size / weight
            for objective in objectives:
                loss, statistics = self.engine(objective, *tensors)
                self.engine.backward(loss * scale)
                parts.append(statistics.double() * (not is_filler))
        sums = torch.stack(parts).sum(0)  # [passes, 7] -> [7], or [passes] -> []
        if self.world_size > 1:
            dist.all_reduce(sums)
        return sums.cpu()

    def _microbatches(self, lengths: Sequence[int]) -> list[list[int]]:
        """The indices of the sequences of each microbatch, `tokens_per_microbatch` at most."""
        return self.roles.microbatches(lengths, self.settings.tokens_per_microbatch)

    def _same_count_on_all_ranks(self, microbatches: list[list[int]]) -> list[list[int]]:
        """The microbatches, followed by fillers of sequence 0 up to the largest number on any rank."""
        if self.world_size == 1:
            return microbatches
        largest_count = torch.tensor(len(microbatches), device=self.device)
        dist.all_reduce(largest_count, op=dist.ReduceOp.MAX)
        return microbatches + [[0]] * (int(largest_count) - len(microbatches))

    def _set_learning_rates(self, coefficients: StepCoefficients) -> None:
        rates = {"policy": coefficients.policy_lr, "critic": coefficients.critic_lr}
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rates[role_of_group(group["role"])] * group["factor"]

    def _skipped_by_deepspeed(self) -> int:
        """Steps that DeepSpeed skipped since the last call, at stages 1 to 3, because a gradient was not finite."""
        seen_before = self._skips_seen
        self._skips_seen = int(self.engine.skipped_steps)
        return self._skips_seen - seen_before


def _mean_statistics(results: Sequence[MinibatchResult]) -> dict[str, float]:
    """Means over the tokens of all optimizer steps of an update."""
    sums = torch.zeros(len(STATISTICS), dtype=torch.float64)  # [7]
    weight = 0.0
    for result in results:
        sums = sums + result.sums
        weight += result.weight
    means = {name: float(total) / weight for name, total in zip(STATISTICS, sums, strict=True)}
    means["ptx_loss"] = sum(result.ptx_loss for result in results) / len(results)
    means["optimizer_steps"] = len(results)
    for role in TRAINED_ROLES:
        means[f"{role}_gradient_norm"] = _finite_mean(result.norms.get(role, math.nan) for result in results)
    return means


def _finite_mean(values: Iterable[float]) -> float:
    """The mean of the finite values; NaN if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
