"""The objective of supervised fine-tuning: the likelihood of demonstrations."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.config.schema import SftSettings
from align.data.examples import TokenizedDemonstration
from align.learner.likelihood import collate_demonstrations, routed_logprobs, trained_logprobs
from align.roles.build import SFT_ROLE, build_sft_trunk
from align.supervised.objective import Objective, SupervisedModule
from policies.batching import Batch
from policies.schema import ModelSettings, PolicySettings


class SftObjective(Objective[TokenizedDemonstration]):
    """Negative log-likelihood of the trained turns, in nats per trained token of the whole batch.

    Attributes:
        datasets: The names of the datasets of a mixture, whose losses are logged each; empty without one.
    """

    def __init__(
        self,
        module: SupervisedModule,
        examples: Sequence[TokenizedDemonstration],
        heldout: Sequence[TokenizedDemonstration],
        settings: SftSettings,
    ) -> None:
        self.module = module
        self.examples = examples
        self.heldout = heldout
        self.peak_rates = {module.role: settings.learning_rate}
        self.smoothing = settings.label_smoothing
        self.noise = settings.neftune_alpha
        self.datasets = sorted({example.dataset for example in (*examples, *heldout) if example.dataset})

    def weight(self, examples: Sequence[TokenizedDemonstration]) -> float:
        return sum(example.trained_tokens for example in examples)

    def collate(self, examples: Sequence[TokenizedDemonstration], device: torch.device) -> tuple[Batch, Tensor | None]:
        """The batch, and in a mixture the index of each trained token's dataset, `[P]` int64."""
        (batch,) = collate_demonstrations(examples, device)
        if not self.datasets:
            return batch, None
        indices = torch.tensor([self.datasets.index(example.dataset) for example in examples])
        tokens = torch.tensor([example.trained_tokens for example in examples])
        return batch, indices.repeat_interleave(tokens).to(device)

    def loss(self, module: SupervisedModule, batch: Batch, indices: Tensor | None) -> tuple[Tensor, Tensor]:
        """The summed loss `[]` of a microbatch, and its statistics, see `_statistics`."""
        logprobs = trained_logprobs(module, batch, module.role, self.smoothing, self.noise)
        return -logprobs.sum(), self._statistics(-logprobs.detach(), indices)

    def heldout_loss(self, module: SupervisedModule, batch: Batch, indices: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `loss`, without smoothing and noise."""
        logprobs = trained_logprobs(module, batch, module.role)
        return -logprobs.sum(), self._statistics(-logprobs.detach(), indices)

    def metrics(self, sums: Tensor, weight: float) -> dict[str, float]:
        """The loss, and that of each dataset of a mixture that has tokens in the batch."""
        return self._named("loss", sums, weight)

    def heldout_metrics(self, sums: Tensor, weight: float) -> dict[str, float]:
        return self._named("heldout_loss", sums, weight)

    def _statistics(self, losses: Tensor, indices: Tensor | None) -> Tensor:
        """The summed loss, and of each of D datasets the loss and the number of tokens, `[1 + 2 D]`.

        Args:
            losses: `[P]`, of each trained token.
            indices: `[P]` int64, the dataset of each; None: there is no mixture.
        """
        total = losses.sum()[None]
        if indices is None:
            return total
        by_dataset = losses.new_zeros(2, len(self.datasets))
        by_dataset = by_dataset.index_add(1, indices, torch.stack([losses, torch.ones_like(losses)]))
        return torch.cat([total, by_dataset.flatten()])

    def _named(self, name: str, sums: Tensor, weight: float) -> dict[str, float]:
        metrics = {name: float(sums[0]) / weight}
        losses, tokens = sums[1:].view(2, -1).tolist()
        for dataset, loss, count in zip(self.datasets, losses, tokens, strict=True):
            if count:
                metrics[f"{name}/{dataset}"] = loss / count
        return metrics


class RoutedSftObjective(SftObjective):
    """As `SftObjective`, with the divergence between the predictions under two routes (AdaMix)."""

    def loss(self, module: SupervisedModule, batch: Batch, indices: Tensor | None) -> tuple[Tensor, Tensor]:
        """The summed loss `[]` of a microbatch, and the statistics of its likelihood, see `_statistics`."""
        logprobs, divergences = routed_logprobs(module, batch, module.role, self.smoothing, self.noise)
        return (divergences - logprobs).sum(), self._statistics(-logprobs.detach(), indices)


@dataclass(frozen=True)
class SftBlueprint:
    """Everything that a process needs to build the objective of SFT.

    Attributes:
        model: Settings of the base model.
        policy: Settings of the adapter.
        seed: Seed of the run.
        examples: The demonstrations.
        heldout: The held-out demonstrations.
        settings: The settings of SFT.
    """

    model: ModelSettings
    policy: PolicySettings
    seed: int
    examples: Sequence[TokenizedDemonstration]
    heldout: Sequence[TokenizedDemonstration]
    settings: SftSettings

    def build(self) -> SftObjective:
        """Load the base model, and build the objective around a new adapter."""
        trunk = build_sft_trunk(self.model, self.policy, self.seed, "sft")
        trunk.start_training(SFT_ROLE)
        trunk.train_only(SFT_ROLE)
        module = SupervisedModule(trunk, SFT_ROLE)
        kind = SftObjective if self.policy.spec.sft_passes == 1 else RoutedSftObjective
        return kind(module, self.examples, self.heldout, self.settings)
