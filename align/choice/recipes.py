"""The experiments that a choice starts with: what each trains, on which rows, and the settings that differ."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from align.choice.facts import RowKind


@dataclass(frozen=True)
class Recipe:
    """An experiment to start with.

    Attributes:
        stages: The stages, in order.
        sources: For each source of `data`, the kinds of rows that can be read as such; the first that exists is.
        methods: The methods of `policy.method` to try, of which the first that fits the machine is taken.
        settings: Other settings, by dotted names.
        after_sft: Whether SFT comes first where there are demonstrations.
    """

    stages: tuple[str, ...]
    sources: Mapping[str, tuple[RowKind, ...]]
    methods: tuple[str, ...] = ("lora", "qlora")
    settings: Mapping[str, Any] = field(default_factory=dict)
    after_sft: bool = False


LINEAR_PROBE = Recipe(
    ("classify",),
    {"labels": ("labels",)},
    methods=("feature",),
    settings={"classify.trains": "head", "classify.epochs": 20, "classify.learning_rate": 1e-2},
)
ADAPTED_CLASSIFIER = Recipe(
    ("classify",), {"labels": ("labels",)}, settings={"classify.epochs": 2, "classify.learning_rate": 5e-4}
)
SOFT_PROMPT = Recipe(
    ("sft",),
    {"demonstrations": ("demonstrations",)},
    methods=("prompt_tuning",),
    settings={"sft.epochs": 5, "sft.learning_rate": 1e-2},
)
ADAPTER = Recipe(
    ("sft",), {"demonstrations": ("demonstrations",)}, settings={"sft.epochs": 2, "sft.learning_rate": 2e-4}
)
FULL = Recipe(
    ("sft",),
    {"demonstrations": ("demonstrations",)},
    methods=("full",),
    settings={"sft.epochs": 2, "sft.learning_rate": 1e-5},
)
TEXT_ADAPTER = Recipe(
    ("sft",), {"demonstrations": ("texts",)}, settings={"sft.truncate": "split", "sft.learning_rate": 2e-4}
)
FULL_TEXT = Recipe(
    ("sft",),
    {"demonstrations": ("texts",)},
    methods=("full",),
    settings={"sft.truncate": "split", "sft.learning_rate": 2e-5},
)
DPO_PAIRS = Recipe(("dpo",), {"preferences": ("preferences",)}, after_sft=True)
KTO = Recipe(("dpo",), {"preferences": ("verdicts",)}, settings={"dpo.loss": "kto"}, after_sft=True)
RLHF = Recipe(
    ("reward", "ppo"),
    {"preferences": ("preferences",), "prompts": ("prompts",)},
    after_sft=True,
)
RATED_RLHF = Recipe(
    ("reward", "ppo"),
    {"preferences": ("ratings",), "prompts": ("prompts", "ratings")},
    after_sft=True,
)
CHECKED = Recipe(
    ("ppo",),
    {"prompts": ("answers",)},
    settings={"ppo.estimator": "grpo", "ppo.samples_per_prompt": 8},
    after_sft=True,
)
"""Its reward is the term that `align.choice.survey` finds to suit the answers."""
