"""Small supervised training runs on the tiny model, of every objective."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config.schema import SftSettings
from align.data.examples import TokenizedDemonstration, TokenizedPreference
from align.data.labels import Classes, LabelledText, Numbers
from align.learner.state import TrainedWeights
from align.supervised.classifier_objective import ClassifierBlueprint
from align.supervised.reward_objective import RewardBlueprint
from align.supervised.sft_objective import SftBlueprint
from policies.build import build_trunk
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights
from rewards.preferences import Pair, Preference, PreferenceExample, Ranking, Rating
from rewards.schema import RewardSettings

LORA = PolicySettings(rank=2, alpha=4.0)
TIED = (Ranking((2, 1)), Ranking((1, 2)), Ranking((1, 1, 1)))
PREFERENCES: dict[str, Sequence[tuple[Preference, str]]] = {
    "pairs": [(Pair(), "")],
    "rankings": [(ranking, "") for ranking in TIED],
    "ratings": [(Rating({"": float(level)}), "") for level in (1, 2, 4, 5)],
    "attributes": [
        (Pair(), "helpful"),
        (Ranking((1, 2)), "harmless"),
        (Rating({"helpful": 2.0, "harmless": 1.0}), ""),
        (Rating({"helpful": 1.0, "harmless": 3.0}), ""),
        (Pair(), ""),
    ],
}
"""By kind of data, the preferences and their attributes, which take turns."""


def random_ids(count: int, generator: torch.Generator) -> list[int]:
    ids: list[int] = torch.randint(4, 290, (count,), generator=generator).tolist()
    return ids


def demonstrations(count: int, seed: int = 0) -> list[TokenizedDemonstration]:
    """Demonstrations of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = 6 + 3 * number % 8
        made.append(TokenizedDemonstration(random_ids(length, generator), [(2, length)]))
    return made


def preferences(kind: str, count: int, seed: int = 0) -> list[TokenizedPreference]:
    """Preference examples of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        preference, attribute = PREFERENCES[kind][number % len(PREFERENCES[kind])]
        responses = 2
        if isinstance(preference, Ranking):
            responses = sum(preference.sizes)
        elif isinstance(preference, Rating):
            responses = 1
        prompt_ids = random_ids(2 + number % 3, generator)
        responses_ids = [random_ids(2 + (number + i) % 5, generator) for i in range(responses)]
        example = PreferenceExample("", ("",) * responses, preference, attribute)
        made.append(TokenizedPreference(example, prompt_ids, responses_ids))
    return made


def labelled_texts(task: str, count: int, seed: int = 0) -> list[LabelledText]:
    """Labelled texts of different lengths, of three classes or with numbers."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        label = "abc"[number * number % 3] if task == "classification" else 0.5 * (number % 5) - 1.0
        made.append(LabelledText("", random_ids(3 + 3 * number % 8, generator), label))
    return made


def random_adapter(model: Path, policy: PolicySettings) -> AdapterWeights:
    """An adapter far from its start: where B is zero, A has no gradient."""
    torch.manual_seed(0)
    trunk = build_trunk(ModelSettings(path=str(model)), policy, ("role",))
    noise = torch.Generator().manual_seed(1)
    weights = {}
    for name, tensor in trunk.read_adapter("role").items():
        weights[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=noise)
    return weights


def sft_blueprint(
    model: Path, policy: PolicySettings = LORA, learning_rate: float = 1e-2, **settings: Any
) -> SftBlueprint:
    """SFT on eight demonstrations."""
    return SftBlueprint(
        model=ModelSettings(path=str(model)),
        policy=policy,
        seed=0,
        examples=demonstrations(8),
        heldout=demonstrations(5, seed=1),
        settings=SftSettings(learning_rate=learning_rate, **settings),
    )


def reward_blueprint(
    model: Path, kind: str, policy: PolicySettings = LORA, sft: AdapterWeights | None = None, **settings: Any
) -> RewardBlueprint:
    """A reward model trained on ten examples of a kind of data."""
    if kind == "attributes":
        settings["attributes"] = {"helpful": 0.7, "harmless": 0.3}
    return RewardBlueprint(
        model=ModelSettings(path=str(model)),
        policy=policy,
        seed=0,
        member=settings.pop("member", 0),
        sft=sft,
        examples=preferences(kind, 10),
        heldout=preferences(kind, 5, seed=1),
        settings=RewardSettings(**{"batch_size": 4, "learning_rate": 1e-2, **settings}),
    )


def classifier_blueprint(
    model: Path, task: str, policy: PolicySettings = LORA, sft: AdapterWeights | None = None, trains: str = "adapter"
) -> ClassifierBlueprint:
    """A classifier, or a regression model, trained on ten texts."""
    return ClassifierBlueprint(
        model=ModelSettings(path=str(model)),
        policy=policy,
        seed=0,
        sft=sft,
        trains_adapter=trains == "adapter",
        space=Classes(("a", "b", "c")) if task == "classification" else Numbers(0.1, 0.7),
        examples=labelled_texts(task, 10),
        heldout=labelled_texts(task, 5, seed=1),
        learning_rate=1e-2,
    )


def flat(weights: TrainedWeights) -> Tensor:
    """All weights as one vector."""
    parts = []
    for named in (*weights.adapters.values(), *weights.heads.values()):
        parts += [named[name].flatten().double() for name in sorted(named)]
    return torch.cat(parts)
