"""The objectives of the stage `classify`: the likelihood of classes, and the squared error of numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from align.data.labels import Classes, LabelledText, LabelSpace
from align.learner.rank import Rank
from align.roles.build import build_sft_trunk
from align.roles.text_classifier import CLASSIFIER_ROLE, TextClassifier, collate_texts
from align.runtime.seeds import seed_for
from align.supervised.objective import Objective, SupervisedModule
from align.supervised.text_states import TextState, text_states
from policies.batching import Batch
from policies.heads import LinearHead
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights, Trunk

LabelExample = LabelledText | TextState


class LabelObjective(Objective[LabelExample]):
    """A mean over labelled texts. The subclasses say of what.

    Where the head alone is trained, the hidden states that it reads never change: they are computed once.
    """

    def __init__(
        self,
        model: TextClassifier,
        trains_adapter: bool,
        examples: Sequence[LabelledText],
        heldout: Sequence[LabelledText],
        learning_rate: float,
    ) -> None:
        """Put the parts together.

        Args:
            model: The classifier.
            trains_adapter: Whether its adapter is trained, or the head alone.
            examples: The training examples.
            heldout: The held-out examples.
            learning_rate: Peak learning rate of adapter and head.
        """
        self.model = model
        self.module = SupervisedModule(model.trunk, CLASSIFIER_ROLE, trains_adapter, nn.ModuleList([model.head]))
        self.texts = examples
        self.heldout_texts = heldout
        self.examples = examples
        self.heldout = heldout
        self.peak_rates = {CLASSIFIER_ROLE: learning_rate}

    def prepare(self, rank: Rank) -> None:
        """Compute the hidden states of all texts, if they do not change."""
        if not self.module.trains_adapter:
            self.examples = text_states(rank, self.model, self.texts)
            self.heldout = text_states(rank, self.model, self.heldout_texts)

    def weight(self, examples: Sequence[LabelExample]) -> float:
        return len(examples)

    def collate(self, examples: Sequence[LabelExample], device: torch.device) -> tuple[Batch | Tensor, Tensor]:
        targets = torch.tensor(self.model.space.targets(examples))  # [B]
        return collate_inputs(examples).to(device), targets.to(device)

    def outputs(self, inputs: Batch | Tensor) -> Tensor:
        """Outputs `[B, C]` of texts, or of their hidden states `[B, H]`."""
        if isinstance(inputs, Batch):
            return self.model(inputs)
        return self.model.head(inputs)


class ClassificationObjective(LabelObjective):
    """Negative log-likelihood of the classes under a softmax over the logits (cross-entropy), in nats per text."""

    def loss(self, module: SupervisedModule, inputs: Batch | Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss `[]` of a microbatch with targets `[B]` int64; and `[2]`: its sum, and the number right."""
        logits = self.outputs(inputs)  # [B, C]
        loss = class_loss(logits, targets)
        right = (logits.detach().argmax(-1) == targets).sum()
        return loss, torch.stack([loss.detach(), right])

    def heldout_loss(self, module: SupervisedModule, inputs: Batch | Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss, statistics = self.loss(module, inputs, targets)
        return loss, statistics[0]

    def metrics(self, sums: Tensor, weight: float) -> dict[str, float]:
        loss, right = sums.tolist()
        return {"loss": loss / weight, "accuracy": right / weight}


class RegressionObjective(LabelObjective):
    """Squared error per text, in units of the variance of the training labels: 1 for their mean."""

    def loss(self, module: SupervisedModule, inputs: Batch | Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss `[]` of a microbatch with targets `[B]` float32, which is also its only statistic."""
        loss = number_loss(self.outputs(inputs), targets)
        return loss, loss.detach()

    def metrics(self, sums: Tensor, weight: float) -> dict[str, float]:
        return {"loss": float(sums) / weight}


def collate_inputs(examples: Sequence[LabelExample]) -> Batch | Tensor:
    """Texts as a batch, or hidden states `[B, H]`."""
    states = [example.state for example in examples if isinstance(example, TextState)]
    if states:
        return torch.stack(states)
    return collate_texts([example.ids for example in examples if isinstance(example, LabelledText)])


def class_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed negative log-likelihood `[]`, in nats, of classes `[B]` int64 under logits `[B, C]`."""
    logprobs = logits.log_softmax(-1)  # [B, C]
    # `cross_entropy` has no deterministic form on GPUs.
    return -logprobs.gather(-1, targets.unsqueeze(-1)).sum()


def number_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Summed squared error `[]` of outputs `[B, 1]`, with targets `[B]`."""
    return (outputs.squeeze(-1) - targets).square().sum()


@dataclass(frozen=True)
class ClassifierBlueprint:
    """Everything that a process needs to build the objective of a classifier.

    Attributes:
        model: Settings of the base model.
        policy: Settings of the adapter.
        seed: Seed of the run.
        sft: The SFT adapter, from which the classifier starts; None: the base itself is the SFT model.
        trains_adapter: Whether the adapter is trained, or the head alone.
        space: What the labels mean.
        examples: The labelled texts.
        heldout: The held-out ones.
        learning_rate: Peak learning rate.
        verbalizers: The token of each class, whose row of the language model's head the class starts with; None: the
            head starts at random.
    """

    model: ModelSettings
    policy: PolicySettings
    seed: int
    sft: AdapterWeights | None
    trains_adapter: bool
    space: LabelSpace
    examples: Sequence[LabelledText]
    heldout: Sequence[LabelledText]
    learning_rate: float
    verbalizers: Sequence[int] | None = None

    def build(self) -> LabelObjective:
        """Load the base model, and build the objective around a classifier that starts from the SFT model."""
        trunk = build_sft_trunk(
            model=self.model,
            policy=self.policy,
            seed=self.seed,
            purpose="classify",
            roles=(CLASSIFIER_ROLE,),
            sft=self.sft,
        )
        if self.trains_adapter and not self.sft:
            trunk.start_training(CLASSIFIER_ROLE)
        trunk.train_only(*[CLASSIFIER_ROLE] * self.trains_adapter)
        kind = ClassificationObjective if isinstance(self.space, Classes) else RegressionObjective
        return kind(
            model=TextClassifier(trunk, self._initial_head(trunk), self.space),
            trains_adapter=self.trains_adapter,
            examples=self.examples,
            heldout=self.heldout,
            learning_rate=self.learning_rate,
        )

    def _initial_head(self, trunk: Trunk) -> LinearHead:
        """A head that starts at random, or with the rows of the verbalizers."""
        generator = torch.Generator().manual_seed(seed_for(self.seed, "classifier head"))
        head = LinearHead(trunk.width, self.space.outputs, generator)
        if self.verbalizers:
            words = trunk.causal.get_output_embeddings().weight  # [V, H]
            head.weight.data.copy_(words[list(self.verbalizers)])
        return head.to(trunk.causal.device)
