"""Reads, checks and tokenizes all the data of a run before its first stage starts."""

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from align.config.schema import Experiment, MixedSource, SourceSettings
from align.config.stage import find_stage
from align.data.examples import (
    Example,
    Parser,
    TokenizedDemonstration,
    TokenizedPreference,
    demonstration_parser,
    dpo_parser,
    preference_parser,
    request_parser,
)
from align.data.forms import DATA_KINDS, DataKind, read_source_rows
from align.data.mixture import drawn, mixture_sizes
from align.data.parsing import parse_rows
from align.runtime.seeds import seed_for
from policies.errors import UserError
from policies.files.base_model import load_model_config, load_tokenizer
from policies.text.encoder import TextEncoder
from rewards.schema import RewardSettings
from rollouts.trajectory import Request

Item = TypeVar("Item")


@dataclass
class Datasets:
    """The training and held-out examples of each stage; empty where no stage needs them.

    Attributes:
        demonstrations: What SFT trains on, and ptx.
        demonstrations_heldout: What SFT is evaluated on.
        preferences: What the reward model trains on.
        preferences_heldout: What the reward model is evaluated on.
        prompts: What PPO samples responses to.
        prompts_heldout: What the policy and the reference are evaluated on.
        skipped: For each source, the location and problem of each invalid row.
        notes: For each source, what is to be known of how its columns are read.
    """

    demonstrations: list[TokenizedDemonstration] = field(default_factory=list)
    demonstrations_heldout: list[TokenizedDemonstration] = field(default_factory=list)
    preferences: list[TokenizedPreference] = field(default_factory=list)
    preferences_heldout: list[TokenizedPreference] = field(default_factory=list)
    prompts: list[Request] = field(default_factory=list)
    prompts_heldout: list[Request] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)


def trains_sft(experiment: Experiment) -> bool:
    """Whether an SFT adapter is trained, rather than taken ready-made."""
    return "sft" in experiment.stages and experiment.sft.adapter is None


def trains_reward(experiment: Experiment) -> bool:
    """Whether a reward model is trained, rather than taken ready-made."""
    reward = experiment.reward
    return "reward" in experiment.stages and reward.has_model and not (reward.model or reward.classifier)


def evaluates_policy(experiment: Experiment) -> bool:
    """Whether the policy is compared with the reference on held-out prompts: after DPO, where there is a reward."""
    reward = experiment.reward
    has_reward = "reward" in experiment.stages or reward.model or reward.classifier or not reward.has_model
    return "ppo" in experiment.stages or ("dpo" in experiment.stages and bool(has_reward))


def read_datasets(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, max_positions: int | None) -> Datasets:
    """Read the data that the experiment's stages need.

    Args:
        experiment: The settings.
        tokenizer: Tokenizer of the base model.
        max_positions: The model's context length in tokens; None where its config does not say.

    Returns:
        The examples, and the rows that were skipped.

    Raises:
        UserError: There are invalid rows, or a source is not set. The message names source, file and line of the first
            invalid rows, or the key of the missing source.
    """
    reader = _Reader(experiment)
    datasets = Datasets(skipped=reader.skipped, notes=reader.notes)
    needed = _needed_sources(experiment)
    encoder = TextEncoder(tokenizer, experiment.data.special_tokens)
    if "demonstrations" in needed:
        parse_demonstrations = demonstration_parser(encoder, experiment.sft, max_positions)
        datasets.demonstrations, datasets.demonstrations_heldout = reader.read_demonstrations(parse_demonstrations)
    parse_preferences = preference_parser(encoder, _preference_settings(experiment), max_positions)
    if "dpo" in experiment.stages:
        parse_preferences = dpo_parser(parse_preferences, experiment.dpo, max_positions)
    if "preferences" in needed:
        datasets.preferences, datasets.preferences_heldout = reader.read_and_split("preferences", parse_preferences)
    elif experiment.data.preferences_heldout:
        datasets.preferences_heldout = reader.read("preferences_heldout", parse_preferences)
    if "prompts" in needed:
        parse_requests = request_parser(encoder, experiment.rollouts, max_positions)
        datasets.prompts, heldout = reader.read_and_split("prompts", parse_requests)
        datasets.prompts_heldout = heldout[: experiment.evaluation.prompts]
    return datasets


def _preference_settings(experiment: Experiment) -> RewardSettings:
    """How preferences are read: as the reward stage says, but as long as DPO says where no reward model is trained."""
    if "dpo" in experiment.stages and not trains_reward(experiment):
        return experiment.reward.model_copy(update={"max_tokens": experiment.dpo.max_tokens})
    return experiment.reward


def _needed_sources(experiment: Experiment) -> set[str]:
    """The sources of `data` that the experiment's stages train on."""
    needed: set[str] = set()
    for name in experiment.stages:
        if name == "sft" and not trains_sft(experiment):
            continue
        if name == "reward" and not trains_reward(experiment):
            continue
        needed.update(find_stage(name).sources)
    if "ppo" in experiment.stages and experiment.ppo.ptx_coefficient:
        needed.add("demonstrations")
    if evaluates_policy(experiment):
        needed.add("prompts")
    return needed


def read_preferences(experiment: Experiment, path: Path | None) -> list[TokenizedPreference]:
    """Read the preference examples to evaluate a reward model on.

    Args:
        experiment: The settings.
        path: The value of `--data`, a file of preferences; None: the experiment's held-out preferences.

    Raises:
        UserError: There are invalid rows, or no preferences.
    """
    encoder = TextEncoder(load_tokenizer(experiment.model.path), experiment.data.special_tokens)
    parse = preference_parser(encoder, experiment.reward, context_length(experiment))
    if path is not None:
        source = SourceSettings(path=str(path))
        try:
            return parse_rows(read_source_rows(source, "preferences"), parse, experiment.data.on_bad_row).items
        except UserError as error:
            raise UserError(f"--data: {error}") from None
    _, heldout = _Reader(experiment).read_and_split("preferences", parse)
    return heldout


def context_length(experiment: Experiment) -> int | None:
    """The most tokens of a sequence: the positions of the models that no soft prompt takes; None where unlimited.

    Raises UserError where a model's config cannot be read.
    """
    models = [experiment.model.path]
    if "ppo" in experiment.stages and experiment.ppo.critic.model:
        models.append(experiment.ppo.critic.model)
    configs = [load_model_config(model) for model in models]
    positions = [getattr(config, "max_position_embeddings", None) for config in configs]
    known: list[int] = [count for count in positions if count is not None]
    if not known:
        return None
    return min(known) - (experiment.policy.virtual_tokens if experiment.policy.spec.prompt_kind else 0)


def split_heldout(
    items: Sequence[Item], share: float, seed: int, key: Callable[[Item], Hashable]
) -> tuple[list[Item], list[Item]]:
    """Split items at random; items with the same key stay on the same side.

    Args:
        items: The items.
        share: Approximate share of the keys that is held out.
        seed: Seed of the split.
        key: Maps an item to its key.

    Returns:
        The items to train on and the held-out ones, each in their original order.

    Raises:
        ValueError: One of the two would be empty.
    """
    keys = list(dict.fromkeys(map(key, items)))
    random.Random(seed).shuffle(keys)
    heldout_keys = set(keys[: max(1, round(len(keys) * share))])
    kept = [item for item in items if key(item) not in heldout_keys]
    heldout = [item for item in items if key(item) in heldout_keys]
    if not kept or not heldout:
        raise ValueError(f"{len(keys)} different prompt{'s' * (len(keys) != 1)} cannot be split in two")
    return kept, heldout


def _split_key(item: TokenizedDemonstration | TokenizedPreference | Request) -> Hashable:
    """The part that must not be on both sides of a split: the prompt or, for plain text without a prompt, the text."""
    if isinstance(item, TokenizedDemonstration) and len(item.prompt_ids) == 1:  # BOS alone
        return tuple(item.ids[1:])
    return tuple(item.prompt_ids)


def _kind_of_source(name: str) -> DataKind:
    """What the rows of a source are; the datasets of a mixture have demonstrations."""
    return next((kind for kind in DATA_KINDS if name.startswith(kind)), DATA_KINDS[0])


class _Reader:
    """Reads the sources of `data`, and splits those without a held-out source."""

    def __init__(self, experiment: Experiment) -> None:
        self.data = experiment.data
        self.seed = experiment.seed
        self.skipped: dict[str, list[str]] = {}
        self.notes: dict[str, list[str]] = {}

    def read_demonstrations(
        self, parse: Parser[TokenizedDemonstration]
    ) -> tuple[list[TokenizedDemonstration], list[TokenizedDemonstration]]:
        """The demonstrations, mixed where there are several datasets, and the held-out ones."""
        mixture = self.data.mixture
        if not mixture:
            return self.read_and_split("demonstrations", parse)
        parts = {name: self._read_part(name, source, parse) for name, source in mixture.items()}
        weights = {name: source.weight for name, source in mixture.items()}
        sizes = {name: len(kept) for name, (kept, _) in parts.items()}
        mixed: list[TokenizedDemonstration] = []
        heldout: list[TokenizedDemonstration] = []
        for name, count in mixture_sizes(sizes, weights, self.data.mixture_temperature).items():
            kept, evaluated = parts[name]
            mixed += drawn(kept, count, self.seed, name)
            heldout += [replace(example, dataset=name) for example in evaluated]
        return mixed, heldout

    def _read_part(
        self, name: str, source: MixedSource, parse: Parser[TokenizedDemonstration]
    ) -> tuple[list[TokenizedDemonstration], list[TokenizedDemonstration]]:
        """The examples of a dataset of the mixture, and the held-out ones."""
        key = f"mixture.{name}"
        items = self._read_source(key, source, parse)
        if source.heldout:
            return items, self._read_source(f"{key}.heldout", source.heldout, parse)
        return self._split(key, items, f"data.{key}.heldout")

    def read(self, name: str, parse: Parser[Example]) -> list[Example]:
        source: SourceSettings | None = getattr(self.data, name)
        if source is None:
            raise UserError(f"data.{name} is not set, and a stage of this experiment needs it")
        return self._read_source(name, source, parse)

    def _read_source(self, name: str, source: SourceSettings, parse: Parser[Example]) -> list[Example]:
        notes: list[str] = []
        try:
            parsed = parse_rows(
                read_source_rows(source, _kind_of_source(name), notes.append), parse, self.data.on_bad_row
            )
        except UserError as error:
            raise UserError(f"data.{name}: {error}") from None
        if parsed.skipped:
            self.skipped[name] = parsed.skipped
        if notes:
            self.notes[name] = notes
        return parsed.items

    def read_and_split(self, name: str, parse: Parser[Example]) -> tuple[list[Example], list[Example]]:
        heldout_name = f"{name}_heldout"
        items = self.read(name, parse)
        if getattr(self.data, heldout_name):
            return items, self.read(heldout_name, parse)
        return self._split(name, items, f"data.{heldout_name}")

    def _split(self, name: str, items: Sequence[Example], heldout_key: str) -> tuple[list[Example], list[Example]]:
        try:
            return split_heldout(items, self.data.heldout_share, seed_for(self.seed, "split", name), _split_key)
        except ValueError as error:
            raise UserError(f"data.{name}: {error}; set {heldout_key} to rows to evaluate on") from None
