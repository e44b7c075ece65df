"""The objective of supervised fine-tuning: the likelihood of demonstrations."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.config.schema import SftSettings
from align.data.examples import TokenizedDemonstration
from align.learner.likelihood import collate_demonstrations, likelihood_objective
from align.roles.build import SFT_ROLE, build_sft_trunk
from align.supervised.objective import Objective, SupervisedModule
from policies.batching import Batch
from policies.schema import ModelSettings, PolicySettings


class SftObjective(Objective[TokenizedDemonstration]):
    """Negative log-likelihood of the trained turns, in nats per trained token of the whole batch."""

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

    def weight(self, examples: Sequence[TokenizedDemonstration]) -> float:
        return sum(example.trained_tokens for example in examples)

    def collate(self, examples: Sequence[TokenizedDemonstration], device: torch.device) -> tuple[Batch]:
        return collate_demonstrations(examples, device)

    def loss(self, module: SupervisedModule, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss `[]` of a microbatch, which is also its only statistic."""
        return likelihood_objective(module, batch, module.role, self.smoothing, self.noise)

    def heldout_loss(self, module: SupervisedModule, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `loss`, without smoothing and noise."""
        return likelihood_objective(module, batch, module.role)

    def metrics(self, sums: Tensor, weight: float) -> dict[str, float]:
        return {"loss": float(sums) / weight}


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
        return SftObjective(module, self.examples, self.heldout, self.settings)
