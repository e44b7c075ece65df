"""The loss of preference optimisation and its gradient, however a batch is split, against float64 formulas."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from align.config.dpo_settings import DpoSettings
from align.data.examples import TokenizedPreference
from align.learner.group import Ranks
from align.learner.rank import Rank
from align.learner.state import TrainedWeights
from align.supervised.dpo_objective import DpoBlueprint, DpoObjective
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights
from rewards.preferences import Pair, Preference, PreferenceExample, Ranking, Rating
from tests.align.supervised.small import random_adapter, random_ids
from tests.integration.plain_dpo import PlainDpo, gradients_of
from tests.integration.plain_gradients import Parts, PlainModel, parts_of
from tests.integration.split_objectives import STEEP, SteepRank, Step
from tests.random_models import save_precise_llama

POLICY = PolicySettings(rank=4, alpha=8.0)
PAIRS: tuple[Preference, ...] = (Pair(), Pair(margin=0.3), Pair(certainty=0.8), Pair(certainty=0.5))
RANKINGS: tuple[Preference, ...] = (
    Ranking((1, 1, 1)),
    Ranking((1, 2)),
    Ranking((2, 1)),
    Ranking((1, 2), open=True),
    Ranking((1, 1)),
)
LABELS: tuple[Preference, ...] = (Rating({"": 1.0}), Rating({"": 0.0}), Pair(), Ranking((1, 1, 1)))
CASES: dict[str, tuple[dict[str, Any], tuple[Preference, ...]]] = {
    "dpo": ({"loss": "dpo", "beta": 0.3}, PAIRS + RANKINGS),
    "conservative dpo": ({"loss": "dpo", "beta": 0.3, "label_smoothing": 0.2}, PAIRS + RANKINGS),
    "ipo": ({"loss": "ipo", "beta": 0.3}, PAIRS + RANKINGS),
    "conservative ipo": ({"loss": "ipo", "label_smoothing": 0.2}, PAIRS),
    "simpo": ({"loss": "simpo", "margin": 0.4}, PAIRS + RANKINGS),
    "kto": ({"loss": "kto", "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}, LABELS),
}
BATCH = [0, 2, 3, 4, 5, 7, 8]


def examples(preferences: Sequence[Preference], count: int = 10) -> list[TokenizedPreference]:
    """Examples of different lengths, whose preferences take turns."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        preference = preferences[number % len(preferences)]
        responses = 1 if isinstance(preference, Rating) else 2
        if isinstance(preference, Ranking):
            responses = sum(preference.sizes)
        example = PreferenceExample("", ("",) * responses, preference)
        prompt_ids = random_ids(2 + number % 3, generator)
        responses_ids = [random_ids(2 + (number + i) % 5, generator) for i in range(responses)]
        made.append(TokenizedPreference(example, prompt_ids, responses_ids))
    return made


class MovedObjective(DpoObjective):
    """An objective whose policy has left the reference: there, all log-ratios would be 0."""

    policy: AdapterWeights

    def prepare(self, rank: Rank) -> None:
        super().prepare(rank)
        self.module.trunk.write_adapter("policy", self.policy)


@dataclass(frozen=True)
class Case:
    """Preference optimisation with one loss, on data of one kind."""

    blueprint: DpoBlueprint
    policy: AdapterWeights

    def build(self) -> MovedObjective:
        objective = self.blueprint.build()
        objective.__class__ = MovedObjective
        assert isinstance(objective, MovedObjective)
        objective.policy = self.policy
        return objective

    def plain(self, data: Sequence[TokenizedPreference], numbers: Sequence[int]) -> tuple[float, Parts]:
        """The loss of some examples of the data and its gradient, the slow way."""
        blueprint = self.blueprint
        assert blueprint.sft is not None
        reference = parts_of(TrainedWeights({"policy": blueprint.sft}), "policy")
        policy = parts_of(TrainedWeights({"policy": self.policy}), "policy")
        for part in policy.values():
            for tensor in part.values():
                tensor.requires_grad_()
        model = PlainModel(Path(blueprint.model.path), POLICY.alpha / POLICY.rank)
        following = [*data[1:], *data[:1]]
        loss = PlainDpo(model, blueprint.settings, reference).loss(
            policy,
            [data[number] for number in numbers],
            [following[number].responses_ids[0] for number in numbers],
        )
        return loss.item(), gradients_of(loss, policy)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_precise_llama(tmp_path_factory.mktemp("model"), tiny_tokenizer)


def case_of(model: Path, name: str) -> Case:
    settings, preferences = CASES[name]
    sft = random_adapter(model, POLICY)
    policy = {key: tensor.flip(0) for key, tensor in sft.items()}
    blueprint = DpoBlueprint(
        model=ModelSettings(path=str(model)),
        policy=POLICY,
        seed=0,
        sft=sft,
        examples=examples(preferences),
        heldout=examples(preferences, 10)[3:7],
        settings=DpoSettings(learning_rate=1.0, **settings),
    )
    return Case(blueprint, policy)


def check(case: Case, step: Step) -> None:
    """A step's loss and gradient are those of the formulas."""
    heldout = case.blueprint.heldout
    assert step.heldout_loss == pytest.approx(case.plain(heldout, range(len(heldout)))[0], rel=1e-5)
    loss, gradients = case.plain(case.blueprint.examples, BATCH)
    assert step.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    before = parts_of(step.before, "policy")
    after = parts_of(step.after, "policy")
    for part, tensors in gradients.items():
        for name, expected in tensors.items():
            measured = (before[part][name] - after[part][name]) / STEEP
            assert (measured - expected).norm() <= 2e-5 * expected.norm() + 1e-7, name


@pytest.mark.parametrize("tokens", [1, 10_000])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_formulas(
    one_rank: Ranks[SteepRank], model: Path, name: str, tokens: int
) -> None:
    case = case_of(model, name)
    (step,) = one_rank.call(SteepRank.step, case.build, BATCH, 0, tokens)
    check(case, step)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_share_a_batch(two_ranks: Ranks[SteepRank], model: Path, name: str) -> None:
    case = case_of(model, name)
    step, other = two_ranks.call(SteepRank.step, case.build, BATCH, 0, 40)
    assert step.metrics == other.metrics
    check(case, step)
