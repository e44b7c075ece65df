"""One rank of the learner: a DeepSpeed engine over policy and critic on one trunk."""

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from align.algorithms.episodes import Episode
from align.config.schema import LearnerSettings, PpoSettings
from align.data.datasets import TokenizedDemonstration
from align.learner.engine import make_deepspeed_engine
from align.learner.objective import STATISTICS, Loss, in_one, likelihood_loss, microbatch, ppo_losses
from align.learner.optimizer import GroupClip, make_optimizer
from align.learner.state import RankState
from align.roles.roles import Roles
from align.roles.scoring import ALL_ROLES, score_microbatches
from policies.batching import Batch, collate
from rollouts.trajectory import RoleOutputs, Trajectory

R = TypeVar("R", Episode, TokenizedDemonstration)

ROLES = ("policy", "critic")
"""What is trained, each with a learning rate and a gradient norm of its own."""


@dataclass(frozen=True)
class StepCoefficients:
    """What one PPO step trains with: learning rates and the weight of the KL in the loss (0: it is in the reward)."""

    policy: float
    critic: float
    kl_in_loss: float


class Learner:
    """Scores trajectories and updates policy and critic.

    All ranks run the same calls in the same order; each is given its own rows in `score` and all of them in `update`.
    """

    def __init__(
        self, roles: Roles, ppo: PpoSettings, learner: LearnerSettings, temperature: float, gradient_checkpointing: bool
    ) -> None:
        """The default process group must exist, one process a rank."""
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.ppo, self.learner, self.temperature = ppo, learner, temperature
        groups, factors = roles.groups()
        sizes = [[parameter.numel() for parameter in parameters] for parameters in groups.values()]
        self.optimizer = make_optimizer(learner, groups, factors)
        if learner.zero == 3:
            for trunk in roles.trunks:
                trunk.use_module_forwards()
        self.engine = make_deepspeed_engine(roles, self.optimizer, learner.zero)
        self.roles = roles.eval()
        learned = RankState(roles, sizes, self.engine, self.optimizer, learner.zero)
        self.policy_weights, self.state, self.restore = learned.policy_weights, learned.state, learned.restore
        if gradient_checkpointing:
            for trunk in roles.trunks:
                trunk.enable_gradient_checkpointing()
        self.clip = GroupClip(learner.max_grad_norm, partitioned=learner.zero > 0)
        self.optimizer.register_step_pre_hook(self.clip)
        self._seen_skips = 0
        self.device = self.engine.device
        self.tokens = learner.tokens_per_microbatch

    @torch.no_grad()
    def score(
        self, trajectories: Sequence[Trajectory], requested_roles: Collection[str] = ALL_ROLES
    ) -> list[RoleOutputs]:
        """What the roles that are asked say of each trajectory. The score is NaN without a reward head."""
        groups = self._level(self.roles.microbatches([t.total_length for t in trajectories], self.tokens))
        return score_microbatches(self.engine, trajectories, groups, self.temperature, self.device, requested_roles)

    def update(
        self,
        episodes: Sequence[Episode],
        orders: Sequence[Sequence[Sequence[int]]],
        coefficients: StepCoefficients,
        demonstrations: Sequence[Sequence[TokenizedDemonstration]] = (),
    ) -> dict[str, float]:
        """Train on all episodes of a step. orders: for each epoch, for each minibatch, the episodes in it.

        demonstrations: those that are mixed into each optimizer step, or none at all.
        Ends early, between two optimizer steps, once the approximate KL a token passes `ppo.target_kl`.
        Statistics are means over the tokens that were trained on, the same on every rank.
        """
        self._set_rates(coefficients)
        skipped = self.clip.skipped
        totals, weights, steps = torch.zeros(len(STATISTICS), dtype=torch.float64), 0.0, 0
        norms: list[dict[str, float]] = []
        likelihoods: list[float] = []
        minibatches = [rows for epoch in orders for rows in epoch]
        for minibatch, mixed_in in zip_longest(minibatches, demonstrations, fillvalue=()):
            rows = [episodes[i] for i in minibatch]
            weight = math.fsum(row.weight * len(row.response_ids) for row in rows)
            sums, likelihood = self._train(rows, weight, coefficients.kl_in_loss, mixed_in)
            totals, weights, steps = totals + sums, weights + weight, steps + 1
            likelihoods.append(likelihood)
            norms.append(dict(self.clip.norms))
            if self._moved_too_far(sums, weight):
                break
        means = {name: float(total) / weights for name, total in zip(STATISTICS, totals, strict=True)}
        return means | {
            "ptx_loss": sum(likelihoods) / steps,
            "optimizer_steps": steps,
            "skipped_steps": self.clip.skipped - skipped + self._skipped_by_deepspeed(),
            **{f"{role}_gradient_norm": _finite_mean(_norm_of(role, of) for of in norms) for role in ROLES},
        }

    def close(self) -> None:
        """Free what DeepSpeed holds; without it ZeRO 3 aborts at exit."""
        self.engine.destroy()
        os.environ.pop("LOCAL_RANK", None)

    def _train(
        self,
        minibatch: Sequence[Episode],
        weight: float,
        kl_in_loss: float,
        demonstrations: Sequence[TokenizedDemonstration],
    ) -> tuple[Tensor, float]:
        """One optimizer step. Returns the statistics' sums over all ranks, and the loss of the demonstrations."""
        losses = ppo_losses(self.roles, self.ppo, self.temperature, kl_in_loss)
        if self.learner.zero == 3:  # it takes the first backward pass of a step for one over all that is trained
            losses = [in_one(losses)]
        sums = self._backward(minibatch, weight, losses, partial(microbatch, device=self.device))
        likelihood = 0.0
        if demonstrations:
            tokens = sum(len(row.response_ids) for row in demonstrations)
            mixed_in = self._backward(
                demonstrations, tokens / self.ppo.ptx_coefficient, [likelihood_loss], self._demonstrated
            )
            likelihood = float(mixed_in) / tokens
        self.clip.norms.clear()  # DeepSpeed skips a step that is not finite before the clip sees it
        self.engine.step()
        return sums, likelihood

    def _demonstrated(self, rows: Sequence[TokenizedDemonstration]) -> tuple[Batch]:
        return (collate([row.prompt_ids for row in rows], [row.response_ids for row in rows]).to(self.device),)

    def _backward(
        self, rows: Sequence[R], weight: float, losses: Sequence[Loss], tensors: Callable[[list[R]], tuple[Any, ...]]
    ) -> Tensor:
        """Accumulate the gradient of the losses of all rows over `weight`, by this rank's share of them.

        tensors: of a microbatch of rows, what each loss is given. Returns the statistics' sums over all ranks.
        """
        rows = sorted(rows, key=lambda row: row.length)
        share = range(self.rank, len(rows), self.world)
        microbatches = self.roles.microbatches([rows[i].length for i in share], self.tokens)
        groups = [[share[i] for i in group] for group in microbatches]
        sums = []
        for place, group in enumerate(self._level(groups)):
            given = tensors([rows[i] for i in group])
            # DeepSpeed averages over ranks; the loss is a mean over the tokens of all of them. A microbatch beyond
            # this rank's own is there to keep step with the other ranks and weighs nothing.
            mine = place < len(groups)
            for loss_of in losses:
                loss, parts = self.engine(loss_of, *given)
                self.engine.backward(loss * (self.world / weight if mine else 0.0))
                sums.append(parts.double() * mine)
        total = torch.stack(sums).sum(0)
        if self.world > 1:
            dist.all_reduce(total)
        return total.cpu()

    def _level(self, groups: list[list[int]]) -> list[list[int]]:
        """The groups, filled up by groups of row 0 alone to as many as the rank with the most has."""
        if self.world == 1:
            return groups
        most = torch.tensor(len(groups), device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return groups + [[0]] * (int(most) - len(groups))

    def _moved_too_far(self, sums: Tensor, weight: float) -> bool:
        target = self.ppo.target_kl
        return target is not None and float(sums[STATISTICS.index("approximate_kl")]) / weight > target

    def _set_rates(self, coefficients: StepCoefficients) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = getattr(coefficients, group["role"].partition(".")[0]) * group["factor"]

    def _skipped_by_deepspeed(self) -> int:
        """Steps that ZeRO itself skipped since last asked: there it looks for non-finite gradients before we do."""
        before, self._seen_skips = self._seen_skips, int(self.engine.skipped_steps)
        return self._seen_skips - before


def _norm_of(role: str, norms: Mapping[str, float]) -> float:
    """The norm of a role's gradient from those of its groups; NaN where it had none."""
    parts = [norm for name, norm in norms.items() if name.partition(".")[0] == role]
    return math.hypot(*parts) if parts else math.nan


def _finite_mean(values: Iterable[float]) -> float:
    """The mean of those that are finite; NaN where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
