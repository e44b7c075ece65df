"""Reads, checks and tokenizes all the data of a run before its first stage starts."""

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from align.config.schema import Experiment, MixedSource, SourceSettings
from align.config.stage import find_stage
from align.data.documents import Document, read_documents
from align.data.examples import (
    Example,
    Parser,
    TokenizedDemonstration,
    TokenizedPreference,
    TokenizedSteps,
    demonstration_parser,
    dpo_parser,
    labelled_text_parser,
    pieces_of,
    preference_parser,
    request_parser,
    step_parser,
)
from align.data.forms import DATA_KINDS, DataKind, read_source_rows
from align.data.labels import LabelledText, LabelSpace, Numbers, label_space, verbalizer_ids
from align.data.mixture import drawn, mixture_sizes
from align.data.parsing import parse_rows
from align.data.readers import read_rows
from align.data.source_row import SourceRow
from align.runtime.seeds import seed_for
from policies.errors import UserError
from policies.files.base_model import load_model_config, load_model_tokenizer
from policies.text.encoder import TextEncoder
from rewards.schema import RewardSettings
from rewards.step_labels import label_scale
from rollouts.trajectory import Request

Item = TypeVar("Item")


@dataclass
class Datasets:
    """The training and held-out examples of each stage; empty where no stage needs them.

    Attributes:
        demonstrations: What SFT trains on, and ptx.
        demonstrations_heldout: What SFT is evaluated on.
        labels: What the classifier trains on.
        labels_heldout: What the classifier is evaluated on.
        label_space: What their labels mean; None without any.
        preferences: What the reward model trains on.
        preferences_heldout: What the reward model is evaluated on.
        step_labels: What a process reward model trains on.
        step_labels_heldout: What it is evaluated on.
        prompts: What PPO samples responses to.
        prompts_heldout: What the policy and the reference are evaluated on.
        texts: What the perplexity of the base model and of each stage's product is measured on, by name.
        skipped: For each source, the location and problem of each invalid row.
        notes: For each source, what is to be known of how its columns are read.
    """

    demonstrations: list[TokenizedDemonstration] = field(default_factory=list)
    demonstrations_heldout: list[TokenizedDemonstration] = field(default_factory=list)
    labels: list[LabelledText] = field(default_factory=list)
    labels_heldout: list[LabelledText] = field(default_factory=list)
    label_space: LabelSpace | None = None
    preferences: list[TokenizedPreference] = field(default_factory=list)
    preferences_heldout: list[TokenizedPreference] = field(default_factory=list)
    step_labels: list[TokenizedSteps] = field(default_factory=list)
    step_labels_heldout: list[TokenizedSteps] = field(default_factory=list)
    prompts: list[Request] = field(default_factory=list)
    prompts_heldout: list[Request] = field(default_factory=list)
    texts: dict[str, list[Document]] = field(default_factory=dict)
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
    reader = _Reader(experiment, max_positions)
    datasets = Datasets(skipped=reader.skipped, notes=reader.notes)
    needed = _needed_sources(experiment)
    encoder = TextEncoder(tokenizer, experiment.data.special_tokens)
    if "demonstrations" in needed:
        parse_demonstrations = demonstration_parser(encoder, experiment.sft, max_positions)
        datasets.demonstrations, datasets.demonstrations_heldout = reader.read_demonstrations(parse_demonstrations)
    if "labels" in needed:
        space = _read_labels(
            datasets, reader, labelled_text_parser(encoder, experiment.classify, max_positions), experiment
        )
        verbalizer_ids(experiment.classify.verbalizers, space, tokenizer)  # raises where one cannot be used
    parse_preferences = preference_parser(encoder, _preference_settings(experiment), max_positions)
    if "dpo" in experiment.stages:
        parse_preferences = dpo_parser(parse_preferences, experiment.dpo, max_positions)
    if "preferences" in needed:
        datasets.preferences, datasets.preferences_heldout = reader.read_and_split("preferences", parse_preferences)
    elif experiment.data.preferences_heldout:
        datasets.preferences_heldout = reader.read("preferences_heldout", parse_preferences)
    if experiment.reward.process:
        _read_step_labels(datasets, reader, _step_parser(experiment, encoder, max_positions), "step_labels" in needed)
    if "prompts" in needed:
        parse_requests = request_parser(encoder, experiment.rollouts, max_positions)
        datasets.prompts, heldout = reader.read_and_split("prompts", parse_requests)
        datasets.prompts_heldout = heldout[: experiment.evaluation.prompts]
    for name, source in experiment.evaluation.texts.items():
        datasets.texts[name] = read_documents(source, encoder, experiment.sft, f"evaluation.texts.{name}")
    return datasets


def _preference_settings(experiment: Experiment) -> RewardSettings:
    """How preferences are read: as the reward stage says, but as long as DPO says where no reward model is trained."""
    if "dpo" in experiment.stages and not trains_reward(experiment):
        return experiment.reward.model_copy(update={"max_tokens": experiment.dpo.max_tokens})
    return experiment.reward


def _step_parser(experiment: Experiment, encoder: TextEncoder, max_positions: int | None) -> Parser[TokenizedSteps]:
    """The parser of labelled steps. Raises UserError where no term reads a reward model at steps."""
    reward = experiment.reward
    if reward.process is None:
        raise UserError("reward.terms has no term of kind process, which labels of steps are for")
    return step_parser(encoder, reward.process, reward.max_tokens, max_positions)


def _read_step_labels(
    datasets: Datasets, reader: "_Reader", parse: Parser[TokenizedSteps], are_trained_on: bool
) -> None:
    """Read the labelled steps that a process reward model trains on, and those that it is evaluated on."""
    if are_trained_on:
        datasets.step_labels, datasets.step_labels_heldout = reader.read_and_split("step_labels", parse)
    elif reader.data.step_labels_heldout:
        datasets.step_labels_heldout = reader.read("step_labels_heldout", parse)
    _check_label_scale(datasets, reader)
    inner = sum(example.has_inner_marks for example in datasets.step_labels)
    if inner:
        reader.note(
            "step_labels",
            f"{inner} of {len(datasets.step_labels)} rows have a step with the separator, or what `pattern` matches, "
            "in it: in responses, such a step is read as several",
        )


def _check_label_scale(datasets: Datasets, reader: "_Reader") -> None:
    """Held-out labels must be of the kind of the training labels."""
    scale = label_scale([example.example for example in datasets.step_labels])
    if not scale.are_probabilities:
        reader.note("step_labels", "labels are numbers beyond 0 to 1: the reward model learns them by regression")
        if reader.label_smoothing:
            raise UserError("reward.label_smoothing has no effect where the labels of data.step_labels are numbers")
    elif not label_scale([example.example for example in datasets.step_labels_heldout]).are_probabilities:
        raise UserError(
            "data.step_labels_heldout has labels beyond 0 to 1, and those that the model learns are probabilities"
        )


def _read_labels(
    datasets: Datasets, reader: "_Reader", parse: Parser[LabelledText], experiment: Experiment
) -> LabelSpace:
    """Read labelled texts, and give what their labels mean; the training data must have every held-out label."""
    texts = reader.read("labels", parse)
    task = experiment.classify.task
    try:
        space = label_space([text.label for text in texts], task)
    except ValueError as error:
        raise UserError(f"data.labels: {error}") from None

    def parse_known(values: Mapping[str, Any]) -> LabelledText:
        text = parse(values)
        space.check(text.label)
        return text

    datasets.labels, datasets.labels_heldout = reader.with_heldout("labels", texts, parse_known)
    trained = {text.label for text in datasets.labels}
    for text in datasets.labels_heldout:
        if not isinstance(space, Numbers) and text.label not in trained:
            raise UserError(
                f"data.labels: all rows of class {text.label!r} are among those held out, by data.heldout_share: set "
                "data.labels_heldout, or add rows of it"
            )
    if isinstance(space, Numbers) and task is None:
        reader.note("labels", "labels are numbers: the task is regression; classify.task sets it")
    datasets.label_space = space
    return space


def _needed_sources(experiment: Experiment) -> set[str]:
    """The sources of `data` that the experiment's stages train on."""
    needed: set[str] = set()
    for name in experiment.stages:
        if name == "sft" and not trains_sft(experiment):
            continue
        if name == "reward" and not trains_reward(experiment):
            continue
        needed.update(_sources_of(name, experiment))
    if "ppo" in experiment.stages and experiment.ppo.ptx_coefficient:
        needed.add("demonstrations")
    if evaluates_policy(experiment):
        needed.add("prompts")
    return needed


def _sources_of(stage: str, experiment: Experiment) -> set[str]:
    """The sources that a stage trains on; a reward model learns preferences or, for a term `process`, step labels."""
    sources = set(find_stage(stage).sources)
    if stage == "reward":
        sources.remove("preferences" if experiment.reward.process else "step_labels")
    return sources


def read_step_labels(experiment: Experiment, path: Path | None) -> list[TokenizedSteps]:
    """Read the labelled steps to evaluate a process reward model on; arguments and errors as of `read_preferences`."""
    encoder = TextEncoder(load_model_tokenizer(experiment.model), experiment.data.special_tokens)
    parse = _step_parser(experiment, encoder, context_length(experiment))
    return _read_heldout(experiment, "step_labels", parse, path)


def read_preferences(experiment: Experiment, path: Path | None) -> list[TokenizedPreference]:
    """Read the preference examples to evaluate a reward model on.

    Args:
        experiment: The settings.
        path: The value of `--data`, a file of preferences; None: the experiment's held-out preferences.

    Raises:
        UserError: There are invalid rows, or no preferences.
    """
    encoder = TextEncoder(load_model_tokenizer(experiment.model), experiment.data.special_tokens)
    parse = preference_parser(encoder, experiment.reward, context_length(experiment))
    return _read_heldout(experiment, "preferences", parse, path)


def _read_heldout(experiment: Experiment, kind: DataKind, parse: Parser[Example], path: Path | None) -> list[Example]:
    """The rows of a file; None: the experiment's held-out rows of a kind."""
    if path is not None:
        source = SourceSettings(path=str(path))
        try:
            return parse_rows(read_source_rows(source, kind), parse, experiment.data.on_bad_row).items
        except UserError as error:
            raise UserError(f"--data: {error}") from None
    _, heldout = _Reader(experiment).read_and_split(kind, parse)
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


def _split_key(
    item: TokenizedDemonstration | TokenizedPreference | TokenizedSteps | Request | LabelledText,
) -> Hashable:
    """The part that must not be on both sides of a split: the prompt or, for plain text without a prompt, the text."""
    if isinstance(item, LabelledText):
        return tuple(item.ids)
    if isinstance(item, TokenizedDemonstration) and len(item.prompt_ids) == 1:  # BOS alone
        return tuple(item.ids[1:])
    return tuple(item.prompt_ids)


def _rows_of(name: str, source: SourceSettings, note: Callable[[str], None]) -> list[SourceRow]:
    """The rows of a source by its name, in align's columns; the datasets of a mixture have demonstrations."""
    if name.startswith("labels"):
        return read_rows(source, note)
    kind = next((kind for kind in DATA_KINDS if name.startswith(kind)), DATA_KINDS[0])
    return read_source_rows(source, kind, note)


class _Reader:
    """Reads the sources of `data`, and splits those without a held-out source."""

    def __init__(self, experiment: Experiment, max_positions: int | None = None) -> None:
        self.data = experiment.data
        self.longest = min(experiment.sft.max_tokens, max_positions or experiment.sft.max_tokens)
        self.seed = experiment.seed
        self.label_smoothing = experiment.reward.label_smoothing
        self.skipped: dict[str, list[str]] = {}
        self.notes: dict[str, list[str]] = {}

    def read_demonstrations(
        self, parse: Parser[TokenizedDemonstration]
    ) -> tuple[list[TokenizedDemonstration], list[TokenizedDemonstration]]:
        """The demonstrations, mixed where there are several datasets, and the held-out ones."""
        mixture = self.data.mixture
        if not mixture:
            items, others = self.read_and_split("demonstrations", parse)
            return self._in_pieces(items), self._in_pieces(others)
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
            heldout = self._read_source(f"{key}.heldout", source.heldout, parse)
        else:
            items, heldout = self._split(key, items, f"data.{key}.heldout")
        return self._in_pieces(items), self._in_pieces(heldout)

    def _in_pieces(self, items: Sequence[TokenizedDemonstration]) -> list[TokenizedDemonstration]:
        """The demonstrations, those texts in pieces that are longer than a row may be."""
        return list(chain.from_iterable(pieces_of(item, self.longest) for item in items))

    def read(self, name: str, parse: Parser[Example]) -> list[Example]:
        source: SourceSettings | None = getattr(self.data, name)
        if source is None:
            raise UserError(f"data.{name} is not set, and a stage of this experiment needs it{self._hint(name)}")
        return self._read_source(name, source, parse)

    def _read_source(self, name: str, source: SourceSettings, parse: Parser[Example]) -> list[Example]:
        notes: list[str] = []
        try:
            parsed = parse_rows(_rows_of(name, source, notes.append), parse, self.data.on_bad_row)
        except UserError as error:
            raise UserError(f"data.{name}: {error}") from None
        if parsed.skipped:
            self.skipped[name] = parsed.skipped
        for text in notes:
            self.note(name, text)
        return parsed.items

    def _hint(self, name: str) -> str:
        """What the experiment may have meant where a source is not set."""
        if name == "preferences" and self.data.step_labels:
            return ": to train the reward model on data.step_labels, set reward.terms to {process: {kind: process}}"
        if name == "step_labels" and self.data.preferences:
            return ": reward.terms has one of kind process; a reward model of preferences is a term of kind model"
        return ""

    def note(self, name: str, text: str) -> None:
        """Note what is to be known of a source."""
        self.notes.setdefault(name, []).append(text)

    def read_and_split(self, name: str, parse: Parser[Example]) -> tuple[list[Example], list[Example]]:
        return self.with_heldout(name, self.read(name, parse), parse)

    def with_heldout(
        self, name: str, items: list[Example], parse: Parser[Example]
    ) -> tuple[list[Example], list[Example]]:
        """The items to train on, and those of the held-out source or, where none is set, a share of the items."""
        heldout_name = f"{name}_heldout"
        if getattr(self.data, heldout_name):
            return items, self.read(heldout_name, parse)
        return self._split(name, items, f"data.{heldout_name}")

    def _split(self, name: str, items: Sequence[Example], heldout_key: str) -> tuple[list[Example], list[Example]]:
        try:
            return split_heldout(items, self.data.heldout_share, seed_for(self.seed, "split", name), _split_key)
        except ValueError as error:
            raise UserError(f"data.{name}: {error}; set {heldout_key} to rows to evaluate on") from None
