"""Reads, checks and tokenizes all the data of a run before its first stage starts."""

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from align.config.schema import Experiment, SourceSettings
from align.config.stage import find_stage
from align.data.parsing import parse_demonstration, parse_prompt, parse_rows
from align.data.readers import read_rows
from align.runtime.seeds import seed_for
from policies.errors import UserError
from policies.files.base_model import load_tokenizer
from policies.text.tokenization import encode_prompt, encode_response
from rewards.preferences import OVERALL, PreferenceExample, Ranking, parse_preference
from rewards.rankings import MAX_OPEN_TIE
from rewards.schema import RewardSettings
from rollouts.trajectory import Request


@dataclass(frozen=True)
class TokenizedDemonstration:
    """A demonstration as token ids; the loss is over the response, including its EOS."""

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class TokenizedPreference:
    """A preference example with its token ids.

    Attributes:
        example: The prompt, the responses and the preference between them.
        prompt_ids: Tokens of the prompt.
        responses_ids: Tokens of each response, in the example's order.
        shares_prompt: Whether all responses follow one copy of the prompt, rather than a copy each.
    """

    example: PreferenceExample
    prompt_ids: list[int]
    responses_ids: list[list[int]]
    shares_prompt: bool = True

    @property
    def length(self) -> int:
        """Number of tokens in its forward pass, padding included."""
        if self.shares_prompt:
            return len(self.prompt_ids) + sum(map(len, self.responses_ids))
        return len(self.responses_ids) * (len(self.prompt_ids) + max(map(len, self.responses_ids)))


Item = TypeVar("Item")
Example = TypeVar("Example", TokenizedDemonstration, TokenizedPreference, Request)
Parser = Callable[[Mapping[str, Any]], Example]
"""Turns a row's columns into an example; raises ValueError, with the reason, for an invalid row."""


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
    """

    demonstrations: list[TokenizedDemonstration] = field(default_factory=list)
    demonstrations_heldout: list[TokenizedDemonstration] = field(default_factory=list)
    preferences: list[TokenizedPreference] = field(default_factory=list)
    preferences_heldout: list[TokenizedPreference] = field(default_factory=list)
    prompts: list[Request] = field(default_factory=list)
    prompts_heldout: list[Request] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)


def trains_sft(experiment: Experiment) -> bool:
    """Whether an SFT adapter is trained, rather than taken ready-made."""
    return "sft" in experiment.stages and experiment.sft.adapter is None


def trains_reward(experiment: Experiment) -> bool:
    """Whether a reward model is trained, rather than taken ready-made."""
    reward = experiment.reward
    return "reward" in experiment.stages and reward.has_model and not (reward.model or reward.classifier)


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
    datasets = Datasets(skipped=reader.skipped)
    needed = _needed_sources(experiment)
    if "demonstrations" in needed:
        parse_demonstrations = demonstration_parser(tokenizer, experiment.sft.max_tokens)
        datasets.demonstrations, datasets.demonstrations_heldout = reader.read_and_split(
            "demonstrations", None, parse_demonstrations
        )
    parse_preferences = preference_parser(tokenizer, experiment.reward)
    if "preferences" in needed:
        datasets.preferences, datasets.preferences_heldout = reader.read_and_split(
            "preferences", "preferences_heldout", parse_preferences
        )
    elif experiment.data.preferences_heldout:
        datasets.preferences_heldout = reader.read("preferences_heldout", parse_preferences)
    if "prompts" in needed:
        rollouts = experiment.rollouts
        parse_requests = request_parser(tokenizer, rollouts.max_prompt_tokens, rollouts.max_new_tokens, max_positions)
        datasets.prompts, heldout = reader.read_and_split("prompts", "prompts_heldout", parse_requests)
        datasets.prompts_heldout = heldout[: experiment.evaluation.prompts]
    return datasets


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
    return needed


def read_preferences(experiment: Experiment, path: Path | None) -> list[TokenizedPreference]:
    """Read the preference examples to evaluate a reward model on.

    Args:
        experiment: The settings.
        path: The value of `--data`, a file of preferences; None: the experiment's held-out preferences.

    Raises:
        UserError: There are invalid rows, or no preferences.
    """
    tokenizer = load_tokenizer(experiment.model.path)
    parse = preference_parser(tokenizer, experiment.reward)
    if path is not None:
        source = SourceSettings(path=str(path))
        try:
            return parse_rows(read_rows(source), parse, experiment.data.on_bad_row).items
        except UserError as error:
            raise UserError(f"--data: {error}") from None
    reader = _Reader(experiment)
    if experiment.data.preferences_heldout:
        return reader.read("preferences_heldout", parse)
    _, heldout = reader.read_and_split("preferences", None, parse)
    return heldout


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
        return tuple(item.response_ids)
    return tuple(item.prompt_ids)


class _Reader:
    """Reads the sources of `data`, and splits those without a held-out source."""

    def __init__(self, experiment: Experiment) -> None:
        self.data = experiment.data
        self.seed = experiment.seed
        self.skipped: dict[str, list[str]] = {}

    def read(self, name: str, parse: Parser[Example]) -> list[Example]:
        source: SourceSettings | None = getattr(self.data, name)
        if source is None:
            raise UserError(f"data.{name} is not set, and a stage of this experiment needs it")
        try:
            parsed = parse_rows(read_rows(source), parse, self.data.on_bad_row)
        except UserError as error:
            raise UserError(f"data.{name}: {error}") from None
        if parsed.skipped:
            self.skipped[name] = parsed.skipped
        return parsed.items

    def read_and_split(
        self, name: str, heldout_name: str | None, parse: Parser[Example]
    ) -> tuple[list[Example], list[Example]]:
        items = self.read(name, parse)
        if heldout_name and getattr(self.data, heldout_name):
            return items, self.read(heldout_name, parse)
        try:
            return split_heldout(items, self.data.heldout_share, seed_for(self.seed, "split", name), _split_key)
        except ValueError as error:
            hint = f", and data.{heldout_name} is not set" if heldout_name else ""
            raise UserError(f"data.{name}: {error}{hint}") from None


def demonstration_parser(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Parser[TokenizedDemonstration]:
    """A parser that turns a row's columns into a demonstration, for `parse_rows`."""

    def parse(values: Mapping[str, Any]) -> TokenizedDemonstration:
        row = parse_demonstration(values)
        demonstration = TokenizedDemonstration(
            prompt_ids=encode_prompt(tokenizer, row.prompt), response_ids=encode_response(tokenizer, row.completion)
        )
        _check_length(demonstration.length, max_tokens, "sft.max_tokens")
        return demonstration

    return parse


def preference_parser(tokenizer: PreTrainedTokenizerBase, settings: RewardSettings) -> Parser[TokenizedPreference]:
    """A parser that turns a row's columns into a preference example, for `parse_rows`."""

    def parse(values: Mapping[str, Any]) -> TokenizedPreference:
        example = parse_preference(values, open_ties=settings.ties == "unknown")
        _check_ties(example, settings)
        _check_attributes(example, settings)
        preference = TokenizedPreference(
            example=example,
            prompt_ids=encode_prompt(tokenizer, example.prompt),
            responses_ids=[encode_response(tokenizer, response) for response in example.responses],
        )
        longest = max(map(len, preference.responses_ids))
        _check_length(len(preference.prompt_ids) + longest, settings.max_tokens, "reward.max_tokens")
        return preference

    return parse


def _check_ties(example: PreferenceExample, settings: RewardSettings) -> None:
    preference = example.preference
    if settings.label_smoothing and isinstance(preference, Ranking) and preference.open:
        largest = max(preference.sizes)
        if largest > MAX_OPEN_TIE:
            raise ValueError(f"a tie of {largest}: with reward.label_smoothing, at most {MAX_OPEN_TIE} may tie")


def _check_attributes(example: PreferenceExample, settings: RewardSettings) -> None:
    for attribute in example.attributes:
        if attribute != OVERALL and attribute not in settings.attributes:
            valid = ", ".join(settings.attributes) or "none"
            raise ValueError(f"attribute {attribute!r} is not in reward.attributes ({valid})")


def request_parser(
    tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, max_new_tokens: int, max_positions: int | None
) -> Parser[Request]:
    """A parser that turns a row's columns into a request without a seed, for `parse_rows`.

    Prompt and response together must fit `max_positions`, the model's context length, where it is known.
    """
    limit = max_prompt_tokens
    key = "rollouts.max_prompt_tokens"
    if max_positions is not None and max_positions - max_new_tokens < max_prompt_tokens:
        limit = max_positions - max_new_tokens
        key = "the model's context length less rollouts.max_new_tokens"

    def parse(values: Mapping[str, Any]) -> Request:
        row = parse_prompt(values)
        prompt_ids = encode_prompt(tokenizer, row.prompt)
        _check_length(len(prompt_ids), limit, key)
        return Request(row.prompt, tuple(prompt_ids), seed=0, columns=row.columns)

    return parse


def _check_length(tokens: int, limit: int, key: str) -> None:
    if tokens > limit:
        raise ValueError(f"{tokens} tokens are more than {key}, {limit}")
