"""A stage that is stopped after every step and taken up again gives, bit for bit, what it gives in one go."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from align.config.schema import ClusterSettings
from align.learner.files import read_weights
from align.learner.group import LocalRank, Ranks
from align.learner.ray_ranks import RayRanks
from align.learner.state import TrainedWeights
from align.resources.ray_cluster import ray_cluster
from align.runs.checkpoint import latest, step_of
from align.runs.record_files import read_lines
from align.runtime.signals import Interrupted, StopRequest
from align.supervised.classifier_objective import ClassifierBlueprint
from align.supervised.fit import FitContext, finished, fit, fitted_weights
from align.supervised.learner import SupervisedLearner, SupervisedLearners, build_learner
from align.supervised.reward_objective import RewardBlueprint
from align.supervised.sft_objective import SftBlueprint
from policies.device import ActorOptions, ComputeSettings
from policies.schema import PolicySettings
from rewards.schema import FitSettings
from tests.align.supervised.small import (
    LORA,
    classifier_blueprint,
    flat,
    random_adapter,
    reward_blueprint,
    sft_blueprint,
)
from tests.align.supervised.toy import context_in
from tests.integration.tiny_run import is_timed

DROPOUT = PolicySettings(rank=2, alpha=4.0, dropout=0.3, lora_plus=4.0)
P_TUNING = PolicySettings(method="p_tuning", virtual_tokens=3, encoder_width=8)
SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "epochs": 1.5,
    "warmup": 0.3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "evaluate_every": 2,
    "tokens_per_microbatch": 40,
}


@dataclass(frozen=True)
class Case:
    """A training run.

    Attributes:
        blueprint: Builds its objective.
        settings: Its settings.
        zero: The ZeRO stage.
        ranks: The ranks; None: one in this process.
        first: Number of steps of the stage before it.
    """

    blueprint: SftBlueprint | RewardBlueprint | ClassifierBlueprint
    settings: FitSettings
    zero: int = 0
    ranks: "KeptRanks | None" = None
    first: int = 0

    @property
    def lengths(self) -> list[int]:
        return [example.length for example in self.blueprint.examples]

    @property
    def steps(self) -> int:
        return self.settings.optimizer_steps(len(self.lengths))

    def context(self, folder: Path, stops: bool = False) -> FitContext:
        return context_in(
            folder,
            keep=1,
            stop=StopRequest(requested=stops),
            policy=self.blueprint.policy,
            base=self.blueprint.model.path,
            zero=self.zero,
            ranks=self.ranks.count if self.ranks else 0,
            first=self.first,
        )

    def start(self) -> Ranks[SupervisedLearner]:
        build = partial(
            build_learner,
            build_objective=self.blueprint.build,
            settings=self.settings,
            zero=self.zero,
            seed=7,
            gradient_checkpointing=False,
        )
        if self.ranks is None:
            return LocalRank(build)
        self.ranks.rebuild(build)
        return self.ranks


def sft(model: Path, policy: PolicySettings, **case: Any) -> Case:
    return Case(sft_blueprint(model, policy), FitSettings(**SETTINGS), **case)


def reward(model: Path, kind: str, policy: PolicySettings = LORA, zero: int = 0, **settings: Any) -> Case:
    """A reward model that starts from an SFT adapter."""
    blueprint = reward_blueprint(model, kind, policy, random_adapter(model, policy), **SETTINGS | settings)
    return Case(blueprint, blueprint.settings, zero)


def train(case: Case, folder: Path) -> None:
    """Train in one go."""
    learners = SupervisedLearners(case.start())
    fit(learners, case.lengths, case.settings, case.context(folder))
    learners.close()


def train_in_steps(cases: Iterable[Case], folder: Path) -> None:
    """Train, stopped after every step and taken up by the next case."""
    for number, case in enumerate(cases, start=1):
        learners = SupervisedLearners(case.start())
        with pytest.raises(Interrupted):
            fit(learners, case.lengths, case.settings, case.context(folder, stops=True))
        learners.close()
        last = latest(folder / "checkpoints")
        assert last is not None
        assert step_of(last) == case.first + number
        if finished(case.context(folder)):
            return


def outcome(folder: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The files of the last checkpoint, the best step and the result; and the metrics that no clock decides."""
    checkpoints = folder / "checkpoints"
    files = {str(p.relative_to(checkpoints)): p.read_bytes() for p in checkpoints.rglob("*") if p.is_file()}
    metrics = []
    for row in read_lines(folder / "metrics.jsonl"):
        metrics.append({name: value for name, value in row.items() if not is_timed(name)})
    return files, metrics


def check(cases: Sequence[Case], folder: Path) -> None:
    """Training runs one after another in one go, and stopped after every step, are the same bit for bit."""
    for case in cases:
        train(case, folder / "whole")
        train_in_steps(repeat(case), folder / "parts")
    files, metrics = outcome(folder / "whole")
    assert f"step-{cases[-1].first + cases[-1].steps}/optimizer-0.safetensors" in files
    assert len([row for row in metrics if "sft/loss" in row]) == sum(case.steps for case in cases)
    resumed_files, resumed_metrics = outcome(folder / "parts")
    assert resumed_files.keys() == files.keys()
    assert [name for name in files if files[name] != resumed_files[name]] == []
    assert resumed_metrics == metrics


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_sft_with_dropout(zero: int, tiny_model: Path, tmp_path: Path) -> None:
    check([sft(tiny_model, DROPOUT, zero=zero)], tmp_path)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_rankings_with_ties(zero: int, tiny_model: Path, tmp_path: Path) -> None:
    check([reward(tiny_model, "rankings", zero=zero)], tmp_path)


@pytest.mark.parametrize(
    ("policy", "zero"),
    [
        (P_TUNING, 0),
        (P_TUNING.model_copy(update={"encoder": "lstm"}), 1),
        (PolicySettings(method="prompt_tuning", virtual_tokens=3), 1),
        (PolicySettings(method="bitfit"), 2),
        (PolicySettings(method="adalora", rank=2, dropout=0.3), 0),
        (PolicySettings(method="adamix", bottleneck=4), 0),
        (PolicySettings(method="adamix", bottleneck=4), 3),
        (PolicySettings(method="full"), 0),
        (PolicySettings(method="full"), 3),
    ],
    ids=lambda value: value.method if isinstance(value, PolicySettings) else value,
)
def test_sft_of_other_methods(policy: PolicySettings, zero: int, tiny_model: Path, tmp_path: Path) -> None:
    check([sft(tiny_model, policy, zero=zero)], tmp_path)


def test_a_reward_model_whose_virtual_tokens_an_encoder_makes(tiny_model: Path, tmp_path: Path) -> None:
    blueprint = reward_blueprint(tiny_model, "ratings", P_TUNING, **SETTINGS)
    check([Case(blueprint, blueprint.settings)], tmp_path)


@pytest.mark.parametrize(("ratings", "zero"), [("regression", 0), ("ordinal", 3)])
def test_attributes(ratings: str, zero: int, tiny_model: Path, tmp_path: Path) -> None:
    check([reward(tiny_model, "attributes", DROPOUT, zero, ratings=ratings, centering=0.1)], tmp_path)


@pytest.mark.parametrize("zero", [0, 2])
def test_the_head_alone(zero: int, tiny_model: Path, tmp_path: Path) -> None:
    check([reward(tiny_model, "pairs", zero=zero, trains="head")], tmp_path)


@pytest.mark.parametrize(
    ("task", "trains", "zero"),
    [("classification", "adapter", 0), ("classification", "head", 2), ("regression", "adapter", 3)],
)
def test_a_classifier(task: str, trains: str, zero: int, tiny_model: Path, tmp_path: Path) -> None:
    blueprint = classifier_blueprint(tiny_model, task, DROPOUT, random_adapter(tiny_model, DROPOUT), trains)
    check([Case(blueprint, FitSettings(**SETTINGS), zero)], tmp_path)


def test_an_ensemble_of_two(tiny_model: Path, tmp_path: Path) -> None:
    first = reward(tiny_model, "pairs")
    second = replace(reward(tiny_model, "pairs", member=1), first=first.steps)
    check([first, second], tmp_path)
    heads = []
    for case, role in ((first, "reward"), (second, "reward_1")):
        heads.append(fitted_weights(case.context(tmp_path / "whole"), [role], [role]).heads[role]["0.weight"])
    assert not torch.equal(*heads)


# Several ranks


class KeptRanks(RayRanks[SupervisedLearner]):
    """Ranks that build one learner after another."""

    def rebuild(self, build: Callable[[], SupervisedLearner]) -> None:
        shared = ray.put(build)
        self._results([actor.build.remote(shared) for actor in self.actors])

    def close(self) -> None:
        self.call(SupervisedLearner.close)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[KeptRanks]:
    with ray_cluster(ClusterSettings(), 2):
        nothing: Any = dict
        ranks = KeptRanks(nothing, [ActorOptions(ComputeSettings(1))] * 2)
        yield ranks
        RayRanks.close(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_ranks_with_dropout(zero: int, two_ranks: KeptRanks, tiny_model: Path, tmp_path: Path) -> None:
    check([sft(tiny_model, DROPOUT, zero=zero, ranks=two_ranks)], tmp_path)
    files, _ = outcome(tmp_path / "whole")
    assert "step-3/optimizer-1.safetensors" in files


@pytest.mark.parametrize("kind", ["rankings", "attributes"])
def test_training_goes_on_with_other_ranks_and_zero_stages(
    kind: str, two_ranks: KeptRanks, tiny_model: Path, tmp_path: Path
) -> None:
    """Each step is taken in another layout than the one before. Centering gives the head's bias a gradient."""
    case = reward(tiny_model, kind, centering=0.1)
    layouts = [(None, 0), (two_ranks, 1), (two_ranks, 3), (None, 2), (two_ranks, 0)]
    assert len(layouts) == case.steps
    train(case, tmp_path / "whole")
    train_in_steps([replace(case, ranks=ranks, zero=zero) for ranks, zero in layouts], tmp_path / "parts")
    start = flat(initial_weights(case))
    expected, result = (flat(last_weights(case, tmp_path / name)) for name in ("whole", "parts"))
    assert (result - expected).norm() < 1e-3 * (expected - start).norm()
    for row, resumed in zip(outcome(tmp_path / "whole")[1], outcome(tmp_path / "parts")[1], strict=True):
        assert resumed.pop("stage") == row.pop("stage")
        assert resumed == pytest.approx(row, rel=1e-3)


def initial_weights(case: Case) -> TrainedWeights:
    learners = SupervisedLearners(case.start())
    weights = learners.state()[0].weights
    learners.close()
    return weights


def last_weights(case: Case, folder: Path) -> TrainedWeights:
    """Everything that is trained, the parameters of the loss as well, in the last checkpoint."""
    return read_weights(
        folder / f"checkpoints/step-{case.steps}", case.blueprint.policy, ["reward"], ["reward", "reward.loss"]
    )


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [0, 2])
def test_a_state_comes_back_bit_for_bit_from_any_layout(
    ranks: int, zero: int, two_ranks: KeptRanks, tiny_model: Path
) -> None:
    case = reward(tiny_model, "rankings")
    learners = SupervisedLearners(case.start())
    for step in range(2):
        learners.train([4 * step, 4 * step + 1], step, 1.0)
    (saved,) = learners.state()
    learners.close()
    other = SupervisedLearners(replace(case, zero=zero, ranks=two_ranks if ranks else None).start())
    other.restore([saved], 0)
    elsewhere = other.state()
    other.close()
    assert torch.equal(flat(elsewhere[0].weights), flat(saved.weights))
    learners = SupervisedLearners(case.start())
    learners.restore(elsewhere, zero)
    (back,) = learners.state()
    learners.close()
    assert torch.equal(flat(back.weights), flat(saved.weights))
    assert back.optimizer.keys() == saved.optimizer.keys()
    assert [name for name in saved.optimizer if not torch.equal(back.optimizer[name], saved.optimizer[name])] == []
