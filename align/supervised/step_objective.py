"""The objective of the reward stage on labels of steps: a process reward model."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.data.examples import TokenizedSteps
from align.supervised.objective import Objective, SupervisedModule
from align.supervised.reward_objective import build_reward_model
from policies.batching import Batch, collate
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights
from rewards.losses import regression_loss, step_loss
from rewards.model import RewardModel
from rewards.schema import RewardSettings
from rewards.step_labels import THRESHOLD, LabelScale, label_scale


class StepObjective(Objective[TokenizedSteps]):
    """The mean loss over the labelled steps of a batch, whatever response they are of, in nats per step.

    Each step counts alike, as where its label is one token more to predict (Lightman et al. 2023, "Let's verify step by
    step"). The subclasses say which loss.
    """

    def __init__(
        self,
        model: RewardModel,
        examples: Sequence[TokenizedSteps],
        heldout: Sequence[TokenizedSteps],
        settings: RewardSettings,
        scale: LabelScale,
    ) -> None:
        """Put the parts together.

        Args:
            model: The reward model, with one head.
            examples: The training examples.
            heldout: The held-out examples.
            settings: The settings of the reward stage.
            scale: What the labels are.
        """
        self.model = model
        self.module = SupervisedModule(model.trunk, model.role, settings.trains == "adapter", model.heads)
        self.examples = examples
        self.heldout = heldout
        self.label_smoothing = settings.label_smoothing
        self.scale = scale
        self.peak_rates = {model.role: settings.learning_rate}

    def weight(self, examples: Sequence[TokenizedSteps]) -> float:
        return sum(len(example.labels) for example in examples)

    def collate(self, examples: Sequence[TokenizedSteps], device: torch.device) -> tuple[Batch, Tensor, Tensor]:
        """The sequences of a microbatch, the tokens in it that complete its S steps, `[S]` int64, and labels `[S]`."""
        batch, ends = collate_steps(examples)
        labels: list[float] = []
        for example in examples:
            labels += example.labels
        return batch.to(device), ends.to(device), torch.tensor(labels).to(device)

    def scores(self, batch: Batch, ends: Tensor) -> Tensor:
        """Scores `[S]` of steps."""
        return self.model.scores_packed(batch.ids, batch.lengths, ends).squeeze(-1)  # [S, 1] -> [S]

    @abstractmethod
    def step_losses(self, scores: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """Losses `[S]` of scores `[S]` with labels `[S]`, of which a share is assumed to be wrong."""

    def heldout_loss(
        self, module: SupervisedModule, batch: Batch, ends: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The summed loss of held-out steps, without smoothing."""
        loss = self.step_losses(self.scores(batch, ends), labels, smoothing=0.0).sum()
        return loss, loss


class StepProbabilityObjective(StepObjective):
    """Binary cross-entropy of labels from 0 to 1; a score is the logit of the probability that the step is right."""

    def step_losses(self, scores: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        return step_loss(scores, labels + smoothing * (1 - 2 * labels))

    def loss(self, module: SupervisedModule, batch: Batch, ends: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss `[]` of a microbatch; and `[2]`: its sum, and the number of steps that are judged right."""
        scores = self.scores(batch, ends)  # [S]
        loss = self.step_losses(scores, labels, self.label_smoothing).sum()
        right = ((scores.detach() >= 0) == (labels >= THRESHOLD)).sum()
        return loss, torch.stack([loss.detach(), right])

    def metrics(self, sums: Tensor, weight: float) -> dict[str, float]:
        loss, right = sums.tolist()
        return {"loss": loss / weight, "accuracy": right / weight}


class StepNumberObjective(StepObjective):
    """Half the squared error of labels that are numbers, standardised by those of the training data."""

    def step_losses(self, scores: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        return regression_loss(scores, (labels - self.scale.mean) / self.scale.std)

    def loss(self, module: SupervisedModule, batch: Batch, ends: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss `[]` of a microbatch, which is also its only statistic."""
        loss = self.step_losses(self.scores(batch, ends), labels, smoothing=0.0).sum()
        return loss, loss.detach()

    def metrics(self, sums: Tensor, weight: float) -> dict[str, float]:
        return {"loss": float(sums) / weight}


def collate_steps(examples: Sequence[TokenizedSteps]) -> tuple[Batch, Tensor]:
    """Pack responses with their prompts.

    Returns:
        The batch, and the index into its ids of the token that completes each of the S labelled steps, `[S]` int64, on
        the CPU.
    """
    prompts = [example.ids[: example.prompt_length] for example in examples]
    responses = [example.ids[example.prompt_length :] for example in examples]
    ends: list[int] = []
    start = 0
    for example in examples:
        ends += [start + end for end in example.ends]
        start += example.length
    return collate(prompts, responses), torch.tensor(ends, dtype=torch.long)


@dataclass(frozen=True)
class StepBlueprint:
    """Everything that a process needs to build the objective of a process reward model.

    Attributes:
        model: Settings of the base model.
        policy: Settings of the adapters.
        seed: Seed of the run.
        sft: The SFT adapter, from which the reward model starts; None: the base itself is the SFT model.
        examples: The responses in labelled steps.
        heldout: The held-out ones.
        settings: The settings of the reward stage.
    """

    model: ModelSettings
    policy: PolicySettings
    seed: int
    sft: AdapterWeights | None
    examples: Sequence[TokenizedSteps]
    heldout: Sequence[TokenizedSteps]
    settings: RewardSettings

    def build(self) -> StepObjective:
        """Load the base model, and build the objective around a reward model that starts from the SFT model."""
        model = build_reward_model(
            model=self.model,
            policy=self.policy,
            seed=self.seed,
            member=0,
            sft=self.sft,
            settings=self.settings,
        )
        scale = label_scale([example.example for example in self.examples])
        kind = StepProbabilityObjective if scale.are_probabilities else StepNumberObjective
        return kind(model, self.examples, self.heldout, self.settings, scale)


@torch.no_grad()
def score_steps(model: RewardModel, examples: Sequence[TokenizedSteps], tokens: int) -> Tensor:
    """Score the labelled steps of all examples.

    Args:
        model: The process reward model.
        examples: The responses.
        tokens: Largest number of tokens per microbatch.

    Returns:
        `[S]` float32, on the CPU, in the order of the examples and their steps.
    """
    scores: dict[int, Tensor] = {}
    for members in model.trunk.microbatches([example.length for example in examples], tokens):
        batch, ends = collate_steps([examples[index] for index in members])
        device = model.trunk.causal.device
        outputs = model.scores_packed(batch.to(device).ids, batch.lengths, ends.to(device)).squeeze(-1).cpu()
        counts = [len(examples[index].ends) for index in members]
        scores |= zip(members, outputs.split(counts), strict=True)
    return torch.cat([scores[index] for index in range(len(examples))])
