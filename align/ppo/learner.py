"""One rank of the learner: a DeepSpeed engine over policy and critic on one trunk."""

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from align.inputs import Example
from align.ppo.engine import make_engine
from align.ppo.episodes import Episode
from align.ppo.optimizer import GroupClip, make_optimizer
from align.ppo.passes import EVERY_ROLE, STATISTICS, Loss, in_one, likelihood_loss, microbatch, ppo_losses, score_groups
from align.ppo.reslice import cut, join
from align.ppo.roles import Roles
from align.schema import LearnerSettings, PpoSettings
from policies.batching import Batch, collate
from policies.errors import UserError
from policies.reading import check_like
from policies.trunk import AdapterWeights, Trunk
from rollouts.trajectory import Scored, Trajectory

R = TypeVar("R", Episode, Example)

ROLES = ("policy", "critic")
"""What is trained, each with a learning rate and a gradient norm of its own."""


@dataclass(frozen=True)
class Rates:
    """What one PPO step trains with: learning rates and the weight of the KL in the loss (0: it is in the reward)."""

    policy: float
    critic: float
    kl_in_loss: float


@dataclass(frozen=True)
class LearnerState:
    """What a checkpoint holds of one rank. The optimizer's tensors are this rank's partitions at ZeRO 1 to 3.

    critic, critic_head: empty where the critic has no adapter, or where there is none.
    """

    policy: AdapterWeights
    critic: AdapterWeights
    critic_head: dict[str, Tensor]
    optimizer: dict[str, Tensor]


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
        self._sizes = [[parameter.numel() for parameter in parameters] for parameters in groups.values()]
        self.optimizer = make_optimizer(learner, groups, factors)
        if learner.zero == 3:
            for trunk in roles.trunks:
                trunk.leave_to_modules()
        self.engine = make_engine(roles, self.optimizer, learner.zero)
        self.roles = roles.eval()
        if gradient_checkpointing:
            for trunk in roles.trunks:
                trunk.checkpoint_gradients()
        self.clip = GroupClip(learner.clip, partitioned=learner.zero > 0)
        self.optimizer.register_step_pre_hook(self.clip)
        self._seen_skips = 0
        self.device = self.engine.device
        self.tokens = learner.tokens_per_microbatch

    @torch.no_grad()
    def score(self, trajectories: Sequence[Trajectory], asked: Collection[str] = EVERY_ROLE) -> list[Scored]:
        """What the roles that are asked say of each trajectory. The score is NaN without a reward head."""
        groups = self._level(self.roles.passes([t.total_length for t in trajectories], self.tokens))
        return score_groups(self.engine, trajectories, groups, self.temperature, self.device, asked)

    def update(
        self,
        episodes: Sequence[Episode],
        orders: Sequence[Sequence[Sequence[int]]],
        rates: Rates,
        demonstrations: Sequence[Sequence[Example]] = (),
    ) -> dict[str, float]:
        """Train on all episodes of a step. orders: for each epoch, for each minibatch, the episodes in it.

        demonstrations: those that are mixed into each optimizer step, or none at all.
        Ends early, between two optimizer steps, once the approximate KL a token passes `ppo.target_kl`.
        Statistics are means over the tokens that were trained on, the same on every rank.
        """
        self._set_rates(rates)
        skipped = self.clip.skipped
        totals, weights, steps = torch.zeros(len(STATISTICS), dtype=torch.float64), 0.0, 0
        norms: list[dict[str, float]] = []
        likelihoods: list[float] = []
        minibatches = [rows for epoch in orders for rows in epoch]
        for minibatch, mixed_in in zip_longest(minibatches, demonstrations, fillvalue=()):
            rows = [episodes[i] for i in minibatch]
            weight = math.fsum(row.weight * len(row.response_ids) for row in rows)
            sums, likelihood = self._train(rows, weight, rates.kl_in_loss, mixed_in)
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

    def policy_weights(self) -> AdapterWeights:
        """A copy of the policy's adapter, whole, on the CPU."""
        return self._read(self.roles.trunk, "policy")

    def state(self) -> LearnerState:
        """All that the update has changed, on the CPU: whole adapters and head, this rank's part of the optimizer."""
        optimizer = {}
        for index, master in enumerate(self._masters()):
            optimizer[f"{index}.master"] = master.detach()
            for name, value in self.optimizer.state.get(master, {}).items():
                optimizer[f"{index}.state.{name}"] = torch.atleast_1d(torch.as_tensor(value))
        return LearnerState(
            policy=self._read(self.roles.trunk, "policy"),
            critic=self._read(self.roles.critic_trunk, "critic"),
            critic_head=self._read_head(),
            optimizer={name: tensor.cpu().contiguous().clone() for name, tensor in optimizer.items()},
        )

    def restore_from(self, states: Sequence[LearnerState], zero: int) -> None:
        """Take up what other ranks, or other numbers of them, have saved at this ZeRO stage."""
        whole = join([state.optimizer for state in states], self._sizes, zero)
        shapes = [master.shape for master in self._masters()]
        own = cut(whole, self._sizes, self.learner.zero, self.rank, self.world, shapes)
        self.restore(replace(states[0], optimizer=own))

    @torch.no_grad()
    def restore(self, state: LearnerState) -> None:
        """Take up, bit for bit, a state of the same rank, number of ranks and ZeRO stage.

        Raises UserError where it is of another model, or was saved otherwise.
        """
        self._check(state)
        self._write(self.roles.trunk, "policy", state.policy)
        self._write(self.roles.critic_trunk, "critic", state.critic)
        if self.roles.critic is not None:
            with self._gathered(list(self.roles.critic.head.parameters()), write=True):
                self.roles.critic.head.load_state_dict(state.critic_head)
        for index, master in enumerate(self._masters()):
            master.copy_(state.optimizer[f"{index}.master"])
            mark = f"{index}.state."
            saved = {n.removeprefix(mark): t for n, t in state.optimizer.items() if n.startswith(mark)}
            self.optimizer.state.pop(master, None)
            if saved:
                own = {name: tensor.to(master.device, copy=True) for name, tensor in saved.items()}
                # A count is saved as one number in a row; the fused optimizer wants it plain, and on the device.
                self.optimizer.state[master] = own | ({"step": own["step"].squeeze()} if "step" in own else {})

    def _check(self, state: LearnerState) -> None:
        masters, what = self._masters(), "the checkpoint's optimizer"
        expected = {f"{index}.master": master for index, master in enumerate(masters)}
        check_like({name: t for name, t in state.optimizer.items() if name.endswith(".master")}, expected, what)
        for name, tensor in state.optimizer.items():
            number, kind, _ = name.split(".", 2) if name.count(".") > 1 else (name.partition(".")[0], "master", "")
            if f"{number}.master" not in expected or kind not in ("master", "state"):
                raise UserError(f"{what} is not of this model: it has {name}")
            if tensor.numel() not in (1, masters[int(number)].numel()):
                raise UserError(f"{what} is not of this model: {name} is {list(tensor.shape)}")
        if self.roles.critic is not None:
            check_like(state.critic_head, self._read_head(), "the checkpoint's critic head")

    def close(self) -> None:
        """Free what DeepSpeed holds; without it ZeRO 3 aborts at exit."""
        self.engine.destroy()
        os.environ.pop("LOCAL_RANK", None)

    def _train(
        self, minibatch: Sequence[Episode], weight: float, kl_in_loss: float, demonstrations: Sequence[Example]
    ) -> tuple[Tensor, float]:
        """One optimizer step. Returns the statistics' sums over all ranks, and the loss of the demonstrations."""
        losses = ppo_losses(self.roles, self.ppo, self.temperature, kl_in_loss)
        if self.learner.zero == 3:  # it takes the first backward pass of a step for one over all that is trained
            losses = [in_one(losses)]
        sums = self._backward(minibatch, weight, losses, partial(microbatch, device=self.device))
        likelihood = 0.0
        if demonstrations:
            tokens = sum(len(row.response_ids) for row in demonstrations)
            mixed_in = self._backward(demonstrations, tokens / self.ppo.ptx, [likelihood_loss], self._demonstrated)
            likelihood = float(mixed_in) / tokens
        self.clip.norms.clear()  # DeepSpeed skips a step that is not finite before the clip sees it
        self.engine.step()
        return sums, likelihood

    def _demonstrated(self, rows: Sequence[Example]) -> tuple[Batch]:
        return (collate([row.prompt_ids for row in rows], [row.response_ids for row in rows]).to(self.device),)

    def _backward(
        self, rows: Sequence[R], weight: float, losses: Sequence[Loss], tensors: Callable[[list[R]], tuple[Any, ...]]
    ) -> Tensor:
        """Accumulate the gradient of the losses of all rows over `weight`, by this rank's share of them.

        tensors: of a microbatch of rows, what each loss is given. Returns the statistics' sums over all ranks.
        """
        rows = sorted(rows, key=lambda row: row.length)
        share = range(self.rank, len(rows), self.world)
        passes = self.roles.passes([rows[i].length for i in share], self.tokens)
        groups = [[share[i] for i in group] for group in passes]
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

    def _set_rates(self, rates: Rates) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = getattr(rates, group["role"].partition(".")[0]) * group["factor"]

    def _skipped_by_deepspeed(self) -> int:
        """Steps that ZeRO itself skipped since last asked: there it looks for non-finite gradients before we do."""
        before, self._seen_skips = self._seen_skips, int(self.engine.skipped_steps)
        return self._seen_skips - before

    def _masters(self) -> list[Tensor]:
        """What the optimizer steps: whole parameters at ZeRO 0, this rank's flat float32 partitions otherwise."""
        zero = self.engine.optimizer
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
            if hasattr(zero, name):
                return list(getattr(zero, name))
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _gathered(self, parameters: list[Any], write: bool = False) -> AbstractContextManager[Any]:
        if self.learner.zero < 3 or not parameters:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(parameters, modifier_rank=0 if write else None)

    def _read(self, trunk: Trunk | None, role: str) -> AdapterWeights:
        if trunk is None:
            return {}
        with self._gathered(list(trunk.adapter(role).values())):
            return {name: tensor.cpu() for name, tensor in trunk.read_adapter(role).items()}

    def _read_head(self) -> AdapterWeights:
        if self.roles.critic is None:
            return {}
        head = self.roles.critic.head
        with self._gathered(list(head.parameters())):
            return {name: tensor.cpu().clone() for name, tensor in head.state_dict().items()}

    def _write(self, trunk: Trunk | None, role: str, weights: AdapterWeights) -> None:
        if trunk is not None:
            with self._gathered(list(trunk.adapter(role).values()), write=True):
                trunk.write_adapter(role, weights)


def _norm_of(role: str, norms: Mapping[str, float]) -> float:
    """The norm of a role's gradient from those of its groups; NaN where it had none."""
    parts = [norm for name, norm in norms.items() if name.partition(".")[0] == role]
    return math.hypot(*parts) if parts else math.nan


def _finite_mean(values: Iterable[float]) -> float:
    """The mean of those that are finite; NaN where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
