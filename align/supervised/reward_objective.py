"""The objective of the reward stage: the loss of preference examples."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from align.data.examples import TokenizedPreference
from align.roles.build import build_sft_trunk
from align.roles.trained import ParameterGroup
from align.runtime.seeds import seed_for
from align.supervised.objective import Objective, SupervisedModule
from policies.batching import Batch, SharedPromptBatch, collate, collate_shared_prompts
from policies.heads import ScalarHead
from policies.module_names import linears
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights, Trunk
from rewards.diagnostics import comparisons
from rewards.model import RewardModel, role_of
from rewards.objective import PreferenceLoss
from rewards.preferences import OVERALL, PreferenceExample
from rewards.schema import RewardSettings

log = logging.getLogger(__name__)

Examples = Sequence[PreferenceExample]


class RewardModule(SupervisedModule):
    """The module of the reward stage: the role's adapter, its heads, and the parameters of the loss.

    Attributes:
        loss: The loss of preference examples.
        shares_prompts: Whether all responses to a prompt follow one copy of it while the module is trained.
    """

    loss_parameters: PreferenceLoss

    def __init__(self, model: RewardModel, loss: PreferenceLoss, trains_adapter: bool, shares_prompts: bool) -> None:
        super().__init__(model.trunk, model.role, trains_adapter, model.heads, loss)
        self.shares_prompts = shares_prompts

    def microbatches(self, lengths: Sequence[int], tokens: int | None = None) -> list[list[int]]:
        """As `TrainedModule.microbatches`; examples that share a prompt are padded."""
        return self.trunk.microbatches(lengths, tokens, padded=self.shares_prompts and self.training)

    def groups(self) -> list[ParameterGroup]:
        """As `TrainedModule.groups`, and groups of their own for parameters of the loss that need other settings."""
        own: list[ParameterGroup] = []
        moved: set[int] = set()
        for name, settings in self.loss_parameters.own_groups.items():
            own.append(ParameterGroup(f"{self.role}.{name}", settings.parameters, options=settings.options))
            moved.update(map(id, settings.parameters))
        rest = []
        for group in super().groups():
            parameters = [parameter for parameter in group.parameters if id(parameter) not in moved]
            if parameters:
                rest.append(replace(group, parameters=parameters))
        return [*rest, *own]


class RewardObjective(Objective[TokenizedPreference]):
    """The mean loss over a batch of preference examples, in nats."""

    def __init__(
        self,
        model: RewardModel,
        module: RewardModule,
        examples: Sequence[TokenizedPreference],
        heldout: Sequence[TokenizedPreference],
        settings: RewardSettings,
    ) -> None:
        """Put the parts together.

        Args:
            model: The reward model.
            module: What is trained of it.
            examples: The training examples.
            heldout: The held-out examples.
            settings: The settings of the reward stage.
        """
        self.model = model
        self.module = module
        self.preference_loss = module.loss_parameters
        self.examples = [replace(example, shares_prompt=module.shares_prompts) for example in examples]
        self.heldout = heldout
        self.label_smoothing = settings.label_smoothing
        self.centering = settings.centering
        self.peak_rates = {model.role: settings.learning_rate}
        for name, group in self.preference_loss.own_groups.items():
            self.peak_rates[f"{model.role}.{name}"] = group.learning_rate
        self._collate = _collate_shared if module.shares_prompts else _collate_separate

    def weight(self, examples: Sequence[TokenizedPreference]) -> float:
        return len(examples)

    def collate(self, examples: Sequence[TokenizedPreference], device: torch.device) -> tuple[Any, Examples]:
        return self._collate(examples, device)

    def loss(self, module: RewardModule, batch: Batch | SharedPromptBatch, examples: Examples) -> tuple[Tensor, Tensor]:
        """The summed loss of a microbatch of B examples with R responses in all.

        Returns:
            The loss `[]`; and `[4]`: its sum, and over the comparisons within the examples, the number ranked right,
            the sum of the score differences, and the number of comparisons.
        """
        scores = self._scores(batch)  # [R, A]
        loss = self.preference_loss(scores, examples, self.label_smoothing).sum()
        if self.centering:
            counts = [len(example.responses) for example in examples]
            scores_by_example = self.preference_loss.score(scores, OVERALL).split(counts)
            means = torch.stack([example_scores.mean() for example_scores in scores_by_example])  # [B]
            loss = loss + self.centering * means.square().sum()
        differences = self._differences(scores.detach(), examples)  # [C]
        right = (differences > 0).sum() + 0.5 * (differences == 0).sum()
        count = differences.new_tensor(len(differences))
        return loss, torch.stack([loss.detach(), right, differences.sum(), count])

    def collate_heldout(self, examples: Sequence[TokenizedPreference], device: torch.device) -> tuple[Any, Examples]:
        """As `collate`, each response with its own copy of the prompt, as in PPO."""
        return _collate_separate(examples, device)

    def heldout_loss(self, module: RewardModule, batch: Batch, examples: Examples) -> tuple[Tensor, Tensor]:
        """The summed loss of held-out examples, without smoothing and centering."""
        loss = self.preference_loss(self._scores(batch), examples).sum()
        return loss, loss

    def metrics(self, sums: Tensor, weight: float) -> dict[str, float]:
        """The loss, and the accuracy and the mean score difference of the comparisons where there are any."""
        loss, right, margin, count = sums.tolist()
        metrics = {"loss": loss / weight}
        if count:
            metrics |= {"accuracy": right / count, "margin": margin / count}
        return metrics

    def _scores(self, batch: Batch | SharedPromptBatch) -> Tensor:
        """Scores `[R, A]` of all responses of a microbatch."""
        if isinstance(batch, SharedPromptBatch):
            return self.model.scores_shared_prompts(batch.ids, batch.positions, batch.attention_mask, batch.last)
        return self.model(batch)

    def _differences(self, scores: Tensor, examples: Examples) -> Tensor:
        """Score differences `[C]` of the comparisons within examples, better minus worse; scores `[R, A]`."""
        starts = [0, *accumulate(len(example.responses) for example in examples)]
        better: dict[str, list[int]] = {}
        worse: dict[str, list[int]] = {}
        for comparison in comparisons(examples):
            (example, first), (other, second) = comparison.better, comparison.worse
            if example == other:
                better.setdefault(comparison.attribute, []).append(starts[example] + first)
                worse.setdefault(comparison.attribute, []).append(starts[example] + second)
        parts = [scores.new_zeros(0)]
        for attribute, indices in better.items():
            attribute_scores = self.preference_loss.score(scores, attribute)  # [R]
            parts.append(attribute_scores[indices] - attribute_scores[worse[attribute]])
        return torch.cat(parts)


@dataclass(frozen=True)
class RewardBlueprint:
    """Everything that a process needs to build the objective of a reward model.

    Attributes:
        model: Settings of the base model.
        policy: Settings of the adapters.
        seed: Seed of the run.
        member: The index of the ensemble's member.
        sft: The SFT adapter, from which the reward model starts; None: the base itself is the SFT model.
        examples: The preference examples.
        heldout: The held-out preference examples.
        settings: The settings of the reward stage.
    """

    model: ModelSettings
    policy: PolicySettings
    seed: int
    member: int
    sft: AdapterWeights | None
    examples: Sequence[TokenizedPreference]
    heldout: Sequence[TokenizedPreference]
    settings: RewardSettings

    def build(self) -> RewardObjective:
        """Load the base model, and build the objective around a reward model that starts from the SFT model."""
        model = build_reward_model(
            model=self.model,
            policy=self.policy,
            seed=self.seed,
            member=self.member,
            sft=self.sft,
            settings=self.settings,
        )
        trunk = model.trunk
        heldout = [preference.example for preference in self.heldout]
        loss = PreferenceLoss(
            examples=[preference.example for preference in self.examples],
            weights=self.settings.weights,
            ratings=self.settings.ratings,
            heldout=heldout,
        )
        shares_prompts = should_share_prompts(trunk, model.role, self.examples)
        trains_adapter = self.settings.trains == "adapter"
        module = RewardModule(model, loss.to(trunk.causal.device), trains_adapter, shares_prompts)
        return RewardObjective(model, module, self.examples, self.heldout, self.settings)


def build_reward_model(
    model: ModelSettings,
    policy: PolicySettings,
    seed: int,
    member: int,
    sft: AdapterWeights | None,
    settings: RewardSettings,
) -> RewardModel:
    """Load the base model with a reward model that starts from the SFT model, ready to be trained.

    Args:
        model: Settings of the base model.
        policy: Settings of the adapter.
        seed: Seed of the run.
        member: The index of the ensemble's member.
        sft: The SFT adapter; None: the base itself is the SFT model.
        settings: The settings of the reward stage.
    """
    role = role_of(member)
    trunk = build_sft_trunk(model, policy, seed, "reward", (role,), sft)
    reward_model = RewardModel(trunk, new_heads(trunk, settings, seed, member), settings.weights, role)
    trains_adapter = settings.trains == "adapter"
    if trains_adapter and not sft:
        trunk.start_training(role)
    trunk.train_only(*[role] * trains_adapter)
    return reward_model


def new_heads(trunk: Trunk, settings: RewardSettings, seed: int, member: int) -> list[ScalarHead]:
    """A head for each attribute, whose initial weights depend on the seed and the ensemble's member."""
    purpose = ("reward head", member) if member else ("reward head",)
    generator = torch.Generator().manual_seed(seed_for(seed, *purpose))
    return [ScalarHead(trunk.width, generator).to(trunk.causal.device) for _ in settings.weights]


def score_preferences(model: RewardModel, preferences: Sequence[TokenizedPreference], tokens: int) -> Tensor:
    """Score all responses of preference examples, each with its own copy of the prompt, as in PPO.

    Args:
        model: The reward model.
        preferences: The examples.
        tokens: Largest number of tokens per microbatch.

    Returns:
        `[R, A]`, the scores of all R responses by attribute.
    """
    return model.attribute_scores(*flatten_responses(preferences), tokens)


def flatten_responses(preferences: Sequence[TokenizedPreference]) -> tuple[list[list[int]], list[list[int]]]:
    """The prompt of every response, and the responses, in the order of the examples."""
    prompts: list[list[int]] = []
    responses: list[list[int]] = []
    for preference in preferences:
        prompts += [preference.prompt_ids] * len(preference.responses_ids)
        responses += preference.responses_ids
    return prompts, responses


def should_share_prompts(trunk: Trunk, role: str, preferences: Sequence[TokenizedPreference]) -> bool:
    """Whether all responses to a prompt should follow one copy of it: the model supports it, and it saves computation.

    It saves the prompt's linear layers for all responses but one. In attention, it costs the products between
    responses, which are computed and then masked.
    """
    linear_cost = sum(layer.weight.numel() for layer in linears(trunk.causal).values())  # per token
    layers = trunk.causal.config.get_text_config().num_hidden_layers
    attention_cost = 2 * trunk.width * layers  # per pair of tokens: queries by keys, and weights by values
    saved = 0
    for preference in preferences:
        prompt = len(preference.prompt_ids)
        separate = [prompt + len(response) for response in preference.responses_ids]
        saved_tokens = (len(separate) - 1) * prompt
        shared = sum(separate) - saved_tokens
        saved_pairs = sum(length * length for length in separate) - shared**2
        saved += saved_tokens * linear_cost + saved_pairs * attention_cost
    if saved <= 0:
        return False
    supported = trunk.supports_shared_prompts(role)
    if not supported:
        log.warning(
            "%s gives other states to responses that share a prompt, in %s: each is computed with a prompt of its own",
            type(trunk.causal).__name__,
            str(trunk.causal.dtype).removeprefix("torch."),
        )
    return supported


def _collate_shared(
    preferences: Sequence[TokenizedPreference], device: torch.device
) -> tuple[SharedPromptBatch, Examples]:
    """The tensors of a microbatch in which all responses follow one copy of their prompt."""
    prompts = [preference.prompt_ids for preference in preferences]
    responses = [preference.responses_ids for preference in preferences]
    batch = collate_shared_prompts(prompts, responses).to(device)
    return batch, [preference.example for preference in preferences]


def _collate_separate(preferences: Sequence[TokenizedPreference], device: torch.device) -> tuple[Batch, Examples]:
    """The tensors of a microbatch with one sequence per response."""
    batch = collate(*flatten_responses(preferences)).to(device)
    return batch, [preference.example for preference in preferences]
