"""The objective of preference optimisation: DPO and its relatives."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from align.algorithms.preference_losses import ipo_loss, kto_loss
from align.config.dpo_settings import DpoSettings
from align.data.examples import TokenizedPreference
from align.learner.rank import Rank
from align.roles.build import build_sft_trunk
from align.supervised.dpo_targets import DpoExample, DpoTargets, all_responses, make_examples, make_targets
from align.supervised.objective import Objective, SupervisedModule
from align.supervised.response_logprobs import collate_responses, current_logprobs, response_logprobs
from policies.batching import Batch
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights
from rewards.losses import bradley_terry_loss
from rewards.preferences import TIE
from rewards.rankings import open_ranking_loss

POLICY_ROLE = "policy"
"""The role that is trained."""
SUMS = ("loss", "right", "margin", "chosen_reward", "rejected_reward", "chosen_logprob", "comparisons")
"""Sums over a batch: the loss; and over its comparisons that are no ties, how many are right, the differences of the
rewards, both rewards, the log-probabilities of the chosen responses, and their number."""


class DpoObjective(Objective[DpoExample]):
    """The mean loss over a batch of preference examples.

    The reference is the policy before the first step, whose log-probabilities are computed once.
    """

    def __init__(
        self,
        module: SupervisedModule,
        examples: Sequence[TokenizedPreference],
        heldout: Sequence[TokenizedPreference],
        settings: DpoSettings,
    ) -> None:
        """Put the parts together.

        Args:
            module: The policy.
            examples: The training examples.
            heldout: The held-out examples.
            settings: The settings of preference optimisation.
        """
        self.module = module
        self.examples = make_examples(examples)
        self.heldout = make_examples(heldout)
        self.peak_rates = {module.role: settings.learning_rate}
        self.loss_function = LOSSES[settings.loss](settings)
        self.uses_reference = settings.uses_reference

    def prepare(self, rank: Rank) -> None:
        """Compute the reference's log-probabilities."""
        if self.uses_reference:
            self.examples = _with_reference(rank, self.examples)
            self.heldout = _with_reference(rank, self.heldout)

    def prepare_batch(self, rank: Rank, examples: Sequence[DpoExample]) -> None:
        """Let the loss estimate what it needs of the whole batch."""
        self.loss_function.prepare_batch(rank, examples)

    def weight(self, examples: Sequence[DpoExample]) -> float:
        return len(examples)

    def collate(self, examples: Sequence[DpoExample], device: torch.device) -> tuple[Batch, DpoTargets]:
        targets = make_targets(examples, self.loss_function.listwise)
        return collate_responses(all_responses(examples)).to(device), targets.to(device)

    def loss(self, module: SupervisedModule, batch: Batch, targets: DpoTargets) -> tuple[Tensor, Tensor]:
        """The summed loss `[]` of a microbatch, and the sums `[7]` of `SUMS`."""
        logprobs = response_logprobs(module, batch)  # [R]
        loss = self.loss_function.loss(logprobs, targets)
        rewards = self.loss_function.rewards(logprobs, targets).detach()  # [R]
        return loss, _statistics(loss.detach(), rewards, logprobs.detach(), targets)

    def metrics(self, sums: Tensor, weight: float) -> dict[str, float]:
        """The loss; and where there are comparisons, the means of the other statistics over them."""
        values = dict(zip(SUMS, sums.tolist(), strict=True))
        metrics = {"loss": values["loss"] / weight}
        if count := values["comparisons"]:
            metrics["accuracy"] = values["right"] / count
            for name in ("margin", "chosen_reward", "rejected_reward", "chosen_logprob"):
                metrics[name] = values[name] / count
        return metrics

    def heldout_metrics(self, sums: Tensor, weight: float) -> dict[str, float]:
        """The loss and, where there are comparisons, the accuracy."""
        metrics = self.metrics(sums, weight)
        return {f"heldout_{name}": metrics[name] for name in ("loss", "accuracy") if name in metrics}


class DpoLoss:
    """A loss of preference optimisation: DPO's (Rafailov et al. 2023, eq. 7 and, for rankings, appendix A.3).

    Attributes:
        listwise: Whether rankings of more than two count as a whole, by their likelihood.
    """

    listwise = True

    def __init__(self, settings: DpoSettings) -> None:
        self.beta = settings.effective_beta
        self.smoothing = settings.label_smoothing

    def prepare_batch(self, rank: Rank, examples: Sequence[DpoExample]) -> None:
        """Estimate what the loss needs of a whole batch; DPO needs nothing."""

    def rewards(self, logprobs: Tensor, targets: DpoTargets) -> Tensor:
        """Implicit rewards `[R]`, β log(π/π_ref), of responses with log-probabilities `[R]`, in nats."""
        return self.beta * (logprobs - targets.reference)

    def loss(self, logprobs: Tensor, targets: DpoTargets) -> Tensor:
        """The summed loss `[]` of the examples, from the log-probabilities `[R]` of their responses, in nats."""
        rewards = self.rewards(logprobs, targets)
        loss = (targets.weight * self.pair_losses(rewards, targets)).sum()
        for start, sizes in targets.rankings:
            loss = loss + self._ranking_loss(rewards[start : start + sum(sizes)], sizes)
        return loss

    def pair_losses(self, rewards: Tensor, targets: DpoTargets) -> Tensor:
        """Losses `[C]` of the comparisons, from rewards `[R]`."""
        chosen = rewards[targets.first]
        rejected = rewards[targets.second]
        return bradley_terry_loss(chosen, rejected, targets.margin, self._smoothed(targets.preference))

    def _ranking_loss(self, rewards: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Loss `[]` of a ranking, best first, and with smoothing of the reversed one; rewards `[K]`."""
        loss = open_ranking_loss(rewards[None], sizes)[0]
        if not self.smoothing:
            return loss
        reverse = open_ranking_loss(rewards[None].flip(-1), sizes[::-1])[0]
        return (1 - self.smoothing) * loss + self.smoothing * reverse

    def _smoothed(self, preference: Tensor) -> Tensor:
        """The probability that each label is right, if some labels are assumed to be wrong."""
        return preference * (1 - self.smoothing) + (1 - preference) * self.smoothing


class IpoLoss(DpoLoss):
    """IPO's loss, of comparisons alone."""

    listwise = False

    def pair_losses(self, rewards: Tensor, targets: DpoTargets) -> Tensor:
        difference = (rewards[targets.first] - rewards[targets.second]) / self.beta
        return ipo_loss(difference, self.beta, self._smoothed(targets.preference))


class SimpoLoss(DpoLoss):
    """SimPO's loss, of comparisons alone; stated margins add to the one of the settings."""

    listwise = False

    def __init__(self, settings: DpoSettings) -> None:
        super().__init__(settings)
        self.margin = settings.effective_margin

    def rewards(self, logprobs: Tensor, targets: DpoTargets) -> Tensor:
        """β times the mean log-probability per token `[R]`."""
        return self.beta * logprobs / targets.tokens

    def pair_losses(self, rewards: Tensor, targets: DpoTargets) -> Tensor:
        margin = targets.margin + self.margin * (targets.preference != TIE)
        chosen = rewards[targets.first]
        rejected = rewards[targets.second]
        return bradley_terry_loss(chosen, rejected, margin, self._smoothed(targets.preference))


class KtoLoss(DpoLoss):
    """KTO's loss, of responses that are good or bad by themselves."""

    listwise = False

    def __init__(self, settings: DpoSettings) -> None:
        super().__init__(settings)
        self.weights = (settings.desirable_weight or 1.0, settings.undesirable_weight or 1.0)
        self.kl = 0.0

    def prepare_batch(self, rank: Rank, examples: Sequence[DpoExample]) -> None:
        """Estimate the KL of the policy to the reference, by the responses of others (section 3.2)."""
        current = current_logprobs(rank, [example.mismatched for example in examples])
        ratios = [now - example.mismatched_reference for now, example in zip(current, examples, strict=True)]
        self.kl = max(0.0, sum(ratios) / len(ratios))

    def loss(self, logprobs: Tensor, targets: DpoTargets) -> Tensor:
        log_ratios = logprobs - targets.reference
        losses = kto_loss(log_ratios, targets.desirable, self.kl, self.beta, self.weights)  # [R]
        return (targets.labelled * losses).sum()


LOSSES: dict[str, type[DpoLoss]] = {
    "dpo": DpoLoss,
    "ipo": IpoLoss,
    "simpo": SimpoLoss,
    "kto": KtoLoss,
}
"""The losses by their name in `dpo.loss`."""


def _with_reference(rank: Rank, examples: Sequence[DpoExample]) -> list[DpoExample]:
    """The examples with log-probabilities under the current weights, those of the reference."""
    logprobs = iter(current_logprobs(rank, all_responses(examples)))
    mismatched = current_logprobs(rank, [example.mismatched for example in examples])
    completed = []
    for example, other in zip(examples, mismatched, strict=True):
        reference = tuple(next(logprobs) for _ in example.reference)
        completed.append(replace(example, reference=reference, mismatched_reference=other))
    return completed


def _statistics(loss: Tensor, rewards: Tensor, logprobs: Tensor, targets: DpoTargets) -> Tensor:
    """The sums `[7]` of `SUMS` of a microbatch, from rewards and log-probabilities `[R]`."""
    decided = targets.preference > TIE  # [C]
    chosen = targets.first[decided]
    margins = rewards[chosen] - rewards[targets.second[decided]]
    right = (margins > 0).sum() + 0.5 * (margins == 0).sum()
    return torch.stack(
        [
            loss,
            right,
            margins.sum(),
            rewards[chosen].sum(),
            rewards[targets.second[decided]].sum(),
            logprobs[chosen].sum(),
            decided.sum().double(),
        ]
    )


@dataclass(frozen=True)
class DpoBlueprint:
    """Everything that a process needs to build the objective of preference optimisation.

    Attributes:
        model: Settings of the base model.
        policy: Settings of the adapter.
        seed: Seed of the run.
        sft: The SFT adapter, from which the policy starts; None: the base itself is the SFT model.
        examples: The preference examples.
        heldout: The held-out preference examples.
        settings: The settings of preference optimisation.
    """

    model: ModelSettings
    policy: PolicySettings
    seed: int
    sft: AdapterWeights | None
    examples: Sequence[TokenizedPreference]
    heldout: Sequence[TokenizedPreference]
    settings: DpoSettings

    def build(self) -> DpoObjective:
        """Load the base model, and build the objective around a policy that starts as the SFT model."""
        trunk = build_sft_trunk(
            model=self.model, policy=self.policy, seed=self.seed, purpose="dpo", roles=(POLICY_ROLE,), sft=self.sft
        )
        trunk.train_only(POLICY_ROLE)
        module = SupervisedModule(trunk, POLICY_ROLE)
        return DpoObjective(module, self.examples, self.heldout, self.settings)
