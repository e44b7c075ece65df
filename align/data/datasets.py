"""All rows that a run needs, read, checked and turned into tokens before its first stage starts."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from align.config.schema import Experiment, SourceSettings
from align.data.readers import PromptRow, parse_demonstration, parse_prompt, parse_rows, read_rows, split_heldout
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
    """A demonstration in tokens; the loss is on the response, EOS included."""

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class TokenizedPreference:
    """Feedback and its tokens; responses_ids: of each response, in the feedback's order.

    shared: the responses stand behind one copy of the prompt, and not each behind its own.
    """

    example: PreferenceExample
    prompt_ids: list[int]
    responses_ids: list[list[int]]
    shared: bool = True

    @property
    def length(self) -> int:
        """Tokens that it is computed in, padding counted."""
        if self.shared:
            return len(self.prompt_ids) + sum(map(len, self.responses_ids))
        return len(self.responses_ids) * (len(self.prompt_ids) + max(map(len, self.responses_ids)))


T = TypeVar("T", TokenizedDemonstration, TokenizedPreference, Request)


@dataclass
class Datasets:
    """The rows of each stage and those that it is judged by; empty where a stage does not run.

    skipped: by source, why each bad row was left out.
    """

    demonstrations: list[TokenizedDemonstration] = field(default_factory=list)
    demonstrations_heldout: list[TokenizedDemonstration] = field(default_factory=list)
    preferences: list[TokenizedPreference] = field(default_factory=list)
    preferences_heldout: list[TokenizedPreference] = field(default_factory=list)
    prompts: list[Request] = field(default_factory=list)
    prompts_heldout: list[Request] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)


def trains_sft(experiment: Experiment) -> bool:
    """Whether an SFT adapter is trained, rather than given or not wanted."""
    return "sft" in experiment.stages and experiment.sft.adapter is None


def trains_reward(experiment: Experiment) -> bool:
    """Whether a reward model is trained, rather than given or not wanted."""
    reward = experiment.reward
    return "reward" in experiment.stages and reward.has_model and not (reward.model or reward.classifier)


def read_datasets(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, context: int | None) -> Datasets:
    """Read what the experiment's stages need. context: the most positions that the model has, if it says.

    Raises UserError naming source, file and line of the first bad row, or the key of a source that is missing.
    """
    reader = _Reader(experiment)
    datasets = Datasets(skipped=reader.skipped)
    if trains_sft(experiment) or ("ppo" in experiment.stages and experiment.ppo.ptx_coefficient):
        parse = demonstration_parser(tokenizer, experiment.sft.max_tokens)
        datasets.demonstrations, datasets.demonstrations_heldout = reader.both("demonstrations", None, parse)
    judged = preference_parser(tokenizer, experiment.reward)
    if trains_reward(experiment):
        datasets.preferences, datasets.preferences_heldout = reader.both("preferences", "preferences_heldout", judged)
    elif experiment.data.preferences_heldout:
        datasets.preferences_heldout = reader.one("preferences_heldout", judged)
    if "ppo" in experiment.stages:
        ask = request_parser(
            tokenizer, experiment.rollouts.max_prompt_tokens, experiment.rollouts.max_new_tokens, context
        )
        datasets.prompts, heldout = reader.both("prompts", "prompts_heldout", ask)
        datasets.prompts_heldout = heldout[: experiment.evaluation.prompts]
    return datasets


def read_preferences(experiment: Experiment, path: Path | None) -> list[TokenizedPreference]:
    """Feedback to judge a reward model by: of a file, or the experiment's held-out rows."""
    tokenizer = load_tokenizer(experiment.model.path)
    if path is not None:
        data = experiment.data.model_copy(update={"preferences_heldout": SourceSettings(path=str(path))})
        experiment = experiment.model_copy(update={"data": data})
    reader = _Reader(experiment)
    if experiment.data.preferences_heldout:
        return reader.one("preferences_heldout", preference_parser(tokenizer, experiment.reward))
    return reader.both("preferences", None, preference_parser(tokenizer, experiment.reward))[1]


def _prompt(row: TokenizedDemonstration | TokenizedPreference | Request) -> Hashable:
    """What must not stand on both sides of a split. Plain text has no prompt but the start: there it is the text."""
    if isinstance(row, TokenizedDemonstration) and len(row.prompt_ids) == 1:
        return tuple(row.response_ids)
    return tuple(row.prompt_ids)


class _Reader:
    """Reads the sources of `data`, and splits where there is no held-out one."""

    def __init__(self, experiment: Experiment) -> None:
        self.data = experiment.data
        self.seed = experiment.seed
        self.skipped: dict[str, list[str]] = {}

    def one(self, name: str, parse: Callable[[Mapping[str, Any]], T]) -> list[T]:
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

    def both(self, name: str, heldout: str | None, parse: Callable[[Mapping[str, Any]], T]) -> tuple[list[T], list[T]]:
        rows = self.one(name, parse)
        if heldout and getattr(self.data, heldout):
            return rows, self.one(heldout, parse)
        try:
            return split_heldout(rows, self.data.heldout_share, seed_for(self.seed, "split", name), _prompt)
        except ValueError as error:
            raise UserError(f"data.{name}: {error}{f', and data.{heldout} is not set' if heldout else ''}") from None


def demonstration_parser(
    tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Callable[[Mapping[str, Any]], TokenizedDemonstration]:
    """From a row to an example; the parser raises ValueError with the reason for people."""

    def parse(values: Mapping[str, Any]) -> TokenizedDemonstration:
        row = parse_demonstration(values)
        example = TokenizedDemonstration(
            encode_prompt(tokenizer, row.prompt), encode_response(tokenizer, row.completion)
        )
        _refuse_long(len(example.prompt_ids) + len(example.response_ids), max_tokens, "sft.max_tokens")
        return example

    return parse


def preference_parser(
    tokenizer: PreTrainedTokenizerBase, settings: RewardSettings
) -> Callable[[Mapping[str, Any]], TokenizedPreference]:
    """From a row to a case; the parser raises ValueError with the reason for people."""

    def parse(values: Mapping[str, Any]) -> TokenizedPreference:
        feedback = parse_preference(values, open_ties=settings.ties == "unknown")
        judgement = feedback.preference
        largest = max(judgement.sizes) if isinstance(judgement, Ranking) and judgement.open else 0
        if settings.label_smoothing and largest > MAX_OPEN_TIE:
            raise ValueError(f"a tie of {largest}: with reward.label_smoothing it may have {MAX_OPEN_TIE}")
        for attribute in feedback.attributes:
            if attribute != OVERALL and attribute not in settings.attributes:
                known = ", ".join(settings.attributes) or "none"
                raise ValueError(f"attribute {attribute!r} is not in reward.attributes ({known})")
        preference = TokenizedPreference(
            example=feedback,
            prompt_ids=encode_prompt(tokenizer, feedback.prompt),
            responses_ids=[encode_response(tokenizer, response) for response in feedback.responses],
        )
        longest = max(map(len, preference.responses_ids))
        _refuse_long(len(preference.prompt_ids) + longest, settings.max_tokens, "reward.max_tokens")
        return preference

    return parse


def request_parser(
    tokenizer: PreTrainedTokenizerBase, max_prompt: int, max_new: int, context: int | None
) -> Callable[[Mapping[str, Any]], Request]:
    """From a row to a request without a seed yet; the parser raises ValueError with the reason for people."""
    room = max_prompt if context is None else min(max_prompt, context - max_new)
    key = "rollouts.max_prompt_tokens" if room == max_prompt else "the model's context less rollouts.max_new_tokens"

    def parse(values: Mapping[str, Any]) -> Request:
        row: PromptRow = parse_prompt(values)
        ids = encode_prompt(tokenizer, row.prompt)
        _refuse_long(len(ids), room, key)
        return Request(row.prompt, tuple(ids), seed=0, columns=row.columns)

    return parse


def _refuse_long(tokens: int, most: int, key: str) -> None:
    if tokens > most:
        raise ValueError(f"{tokens} tokens are more than {key}, {most}")
