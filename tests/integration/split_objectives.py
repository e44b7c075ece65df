"""Objectives of every kind on random examples, and a rank that takes one steep step of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from align.config.schema import SftSettings
from align.data.examples import TokenizedDemonstration, TokenizedPreference
from align.learner.state import TrainedWeights
from align.roles.build import SFT_ROLE
from align.supervised.learner import SupervisedLearner
from align.supervised.objective import Objective
from align.supervised.reward_objective import RewardBlueprint, RewardModule, RewardObjective
from align.supervised.sft_objective import SftBlueprint, SftObjective
from policies.build import build_trunk
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights
from rewards.model import role_of
from rewards.objective import TieParameters
from rewards.preferences import Pair, Preference, PreferenceExample, Ranking, Rating
from rewards.schema import FitSettings, RewardSettings
from tests.integration.plain_gradients import B, Parts, Plain, PlainModel, PlainReward, parts_of, sft

POLICY = PolicySettings(rank=4, alpha=8.0, lora_plus=16.0)
STEEP = 1e3
"""A learning rate so steep that float32 keeps the gradient's digits when it is read off the change of the weights."""
SETTINGS = FitSettings(optimizer="sgd", max_grad_norm=1e12)
REWARD = RewardSettings(learning_rate=1.0)
TWO_ATTRIBUTES = RewardSettings(learning_rate=1.0, attributes={"helpful": 0.75, "harmless": 0.25})
MIXED = TWO_ATTRIBUTES.model_copy(update={"ratings": "ordinal", "label_smoothing": 0.1, "centering": 0.2})


@dataclass(frozen=True)
class Step:
    """What a rank returns of one step of plain gradient descent.

    Attributes:
        before: What is trained, before it.
        after: The same after it.
        metrics: The metrics of the step.
        heldout_loss: The held-out loss before it.
    """

    before: TrainedWeights
    after: TrainedWeights
    metrics: dict[str, float]
    heldout_loss: float


class SteepRank:
    """A rank that builds one learner after another, for any objective."""

    def step(self, build: Callable[[], Objective[Any]], numbers: Sequence[int], zero: int, tokens: int) -> Step:
        """Take a step of an objective on the examples of these numbers, in microbatches of so many tokens."""
        settings = SETTINGS.model_copy(update={"tokens_per_microbatch": tokens})
        learner = SupervisedLearner(build(), settings, zero, seed=0)
        heldout_loss = learner.heldout_metrics()["heldout_loss"]
        before = learner.state().weights
        metrics = learner.train(numbers, 0, STEEP).metrics
        after = learner.state().weights
        learner.close()
        return Step(before, after, metrics, heldout_loss)

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class Case:
    """An objective to be split.

    Attributes:
        model: Folder of the base model.
        blueprint: Builds the objective in the process of a rank.
        shares_prompts: Whether responses share a prompt; of no matter in SFT.
        adapter: The adapter to start from: with B at zero, A would have no gradient.
    """

    model: Path
    blueprint: SftBlueprint | RewardBlueprint
    shares_prompts: bool
    adapter: AdapterWeights

    @property
    def role(self) -> str:
        """The role that is trained."""
        return SFT_ROLE if isinstance(self.blueprint, SftBlueprint) else role_of(self.blueprint.member)

    @property
    def batch(self) -> list[int]:
        """A batch without a quarter of the examples, among them strict rankings: it has more ties than the data."""
        return [number for number in range(len(self.blueprint.examples)) if number % 4 != 1]

    @property
    def preferences(self) -> list[Preference]:
        """The preferences of the examples of a reward stage."""
        assert isinstance(self.blueprint, RewardBlueprint)
        return [example.example.preference for example in self.blueprint.examples]

    def length(self, number: int) -> int:
        """The length of an example of a reward stage, by which examples are dealt to the ranks."""
        assert isinstance(self.blueprint, RewardBlueprint)
        return replace(self.blueprint.examples[number], shares_prompt=self.shares_prompts).length

    def build(self) -> Objective[Any]:
        """Build the objective."""
        if isinstance(self.blueprint, SftBlueprint):
            return _build_sft(self.blueprint, self.adapter)
        return _build_reward(self.blueprint, self.shares_prompts)

    def measured(self, step: Step) -> Parts:
        """The gradient that a step has subtracted."""
        before = parts_of(step.before, self.role)
        after = parts_of(step.after, self.role)
        gradients: Parts = {}
        for part, tensors in before.items():
            gradients[part] = {}
            for name, tensor in tensors.items():
                rate = STEEP * (TieParameters.LEARNING_RATE if part == "ties" else 1.0)
                if name.endswith(B):
                    rate *= POLICY.lora_plus or 1.0
                gradients[part][name] = (tensor - after[part][name]) / rate
        return gradients

    def plain(self, weights: TrainedWeights, numbers: Sequence[int]) -> Plain:
        """The loss of the examples of these numbers and its gradient, the slow way."""
        parts = self._parts(weights)
        blueprint = self.blueprint
        if isinstance(blueprint, SftBlueprint):
            return sft(self._plain_model, parts, [blueprint.examples[number] for number in numbers])
        return self._plain_reward(blueprint).evaluate(parts, [blueprint.examples[number] for number in numbers])

    def plain_heldout_loss(self, weights: TrainedWeights) -> float:
        """The held-out loss, the slow way."""
        parts = self._parts(weights)
        blueprint = self.blueprint
        if isinstance(blueprint, SftBlueprint):
            return sft(self._plain_model, parts, blueprint.heldout).loss
        return self._plain_reward(blueprint).evaluate(parts, blueprint.heldout, trains=False).loss

    def _parts(self, weights: TrainedWeights) -> Parts:
        """What is trained, beside the adapter where that is fixed."""
        return parts_of(TrainedWeights({self.role: self.adapter}), self.role) | parts_of(weights, self.role)

    @property
    def _plain_model(self) -> PlainModel:
        return PlainModel(self.model, POLICY.alpha / POLICY.rank)

    def _plain_reward(self, blueprint: RewardBlueprint) -> PlainReward:
        return PlainReward(self._plain_model, blueprint.settings, blueprint.examples, blueprint.heldout)


def _build_sft(blueprint: SftBlueprint, adapter: AdapterWeights) -> SftObjective:
    objective = blueprint.build()
    objective.module.trunk.write_adapter(SFT_ROLE, adapter)
    return objective


def _build_reward(blueprint: RewardBlueprint, shares_prompts: bool) -> RewardObjective:
    built = blueprint.build()
    # Where the data say, the gradients of these parameters would be small differences, of which float32 keeps little.
    with torch.no_grad():
        for parameter in built.preference_loss.parameters():
            parameter.add_(0.5)
    module = RewardModule(built.model, built.preference_loss, built.module.trains_adapter, shares_prompts)
    return RewardObjective(built.model, module, blueprint.examples, blueprint.heldout, blueprint.settings)


def demonstrations(seed: int, count: int) -> list[TokenizedDemonstration]:
    """Demonstrations with one or two trained turns."""
    draw = _Draw(seed)
    drawn = []
    for number in range(count):
        ids = draw.ids(3, 40)
        middle = len(ids) // 2
        turns = [(1, len(ids))] if number % 3 else [(1, middle), (middle + 1, len(ids))]
        drawn.append(TokenizedDemonstration(ids, turns))
    return drawn


def preferences(seed: int, *kinds: tuple[Preference, str]) -> list[TokenizedPreference]:
    """An example of each preference, with the attribute that it is about."""
    draw = _Draw(seed)
    drawn = []
    for number, (preference, attribute) in enumerate(kinds):
        count = 1 if isinstance(preference, Rating) else 2
        if isinstance(preference, Ranking):
            count = sum(preference.sizes)
        texts = tuple(f"response {i}" for i in range(count))
        example = PreferenceExample(f"prompt {number}", texts, preference, attribute)
        responses = [draw.ids(1, 12) for _ in range(count)]
        drawn.append(TokenizedPreference(example, draw.ids(1, 20), responses))
    return drawn


PAIRS: list[tuple[Preference, str]] = [
    (Pair(), ""),
    (Pair(margin=0.5), ""),
    (Pair(certainty=0.8), ""),
    (Pair(certainty=0.5), ""),
    (Pair(), ""),
    (Pair(margin=1.5, certainty=0.9), ""),
    (Pair(), ""),
]
RANKINGS: list[tuple[Preference, str]] = [
    (Ranking((1, 2, 1)), ""),
    (Ranking((1, 1)), ""),
    (Ranking((3, 1)), ""),
    (Ranking((2,)), ""),
    (Ranking((2, 2), open=True), ""),
    (Ranking((1, 1, 1, 1)), ""),
    (Ranking((1, 3), open=True), ""),
    (Ranking((1, 1, 2)), ""),
]
RATINGS: list[tuple[Preference, str]] = [
    (Rating({"helpful": 4.0, "harmless": 1.0}), ""),
    (Rating({"helpful": 2.0}), ""),
    (Rating({"harmless": 5.0}), ""),
    (Rating({"": 1.0}), ""),
    (Rating({"helpful": 1.0, "harmless": 3.0}), ""),
    (Rating({"": 1.0}), ""),
    (Rating({"helpful": 5.0, "harmless": 2.0}), ""),
    (Rating({"": 4.0}), ""),
]
OF_ATTRIBUTES: list[tuple[Preference, str]] = [
    (Pair(margin=0.5), "helpful"),
    (Ranking((1, 1, 1)), "harmless"),
    (Ranking((1, 2)), "harmless"),
    (Ranking((2, 1)), "helpful"),
    (Ranking((1, 2), open=True), "helpful"),
    (Pair(), "harmless"),
]


def cases(model: Path) -> dict[str, Case]:
    """A case of every kind by name, in which no prompt is shared."""
    adapter = _random_adapter(model)
    reward = partial(_reward_case, model, adapter)
    blueprint = SftBlueprint(
        model=_model_settings(model),
        policy=POLICY,
        seed=0,
        examples=demonstrations(0, 13),
        heldout=demonstrations(1, 5),
        settings=SftSettings(learning_rate=1.0),
    )
    mixed = [*PAIRS, *RANKINGS, *RATINGS, *OF_ATTRIBUTES]
    return {
        "sft": Case(model, blueprint, False, adapter),
        "pairs": reward(REWARD, PAIRS),
        "rankings": reward(REWARD, RANKINGS),
        "ratings": reward(TWO_ATTRIBUTES, RATINGS),
        "mixed": reward(MIXED, mixed),
        "first member": reward(TWO_ATTRIBUTES, OF_ATTRIBUTES + PAIRS),
        "second member": reward(TWO_ATTRIBUTES, OF_ATTRIBUTES + PAIRS, member=1),
        "heads alone": reward(TWO_ATTRIBUTES.model_copy(update={"trains": "head"}), mixed),
    }


def sharing_prompts(case: Case) -> Case:
    """The same case with responses that share their prompts."""
    return replace(case, shares_prompts=True)


def _reward_case(
    model: Path,
    adapter: AdapterWeights,
    settings: RewardSettings,
    kinds: Sequence[tuple[Preference, str]],
    member: int = 0,
) -> Case:
    blueprint = RewardBlueprint(
        model=_model_settings(model),
        policy=POLICY,
        seed=0,
        member=member,
        sft=adapter,
        examples=preferences(0, *kinds),
        heldout=preferences(1, *kinds),
        settings=settings,
    )
    return Case(model, blueprint, False, adapter)


def _model_settings(model: Path) -> ModelSettings:
    return ModelSettings(path=str(model), dtype="float32")


def _random_adapter(model: Path) -> AdapterWeights:
    noise = torch.Generator().manual_seed(3)
    adapter = {}
    for name, parameter in build_trunk(_model_settings(model), POLICY, (SFT_ROLE,)).adapter(SFT_ROLE).items():
        adapter[name] = 0.05 * torch.randn(parameter.shape, generator=noise)
    return adapter


class _Draw:
    """Draws token ids."""

    def __init__(self, seed: int) -> None:
        self.noise = torch.Generator().manual_seed(seed)

    def ids(self, low: int, high: int) -> list[int]:
        """A list of `low` or more tokens, and fewer than `high`."""
        length = int(torch.randint(low, high, (), generator=self.noise))
        return torch.randint(4, 290, (length,), generator=self.noise).tolist()
