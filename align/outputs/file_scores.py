"""`align score`: scores the responses in a file by a run's reward."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from align.config.schema import SourceSettings
from align.data.datasets import context_length
from align.data.parsing import parse_rows
from align.data.readers import read_rows
from align.outputs.trained_run import TrainedRun
from align.runtime.atomic_files import write_text
from policies.errors import UserError
from policies.text import columns as fields
from policies.text.encoder import ASSISTANT
from policies.text.tokenization import Prompt

ADDED = ("score", "terms")
"""The keys that each row of the written file has besides its own."""


@dataclass(frozen=True)
class ResponseRow:
    """A response to score.

    Attributes:
        values: The row as it was read.
        prompt: The prompt.
        response: The response.
        columns: The other columns, for the reward's terms and the chat template.
    """

    values: Mapping[str, Any]
    prompt: Prompt
    response: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class FileScores:
    """The scores of a file's responses.

    Attributes:
        rows: The responses `[N]`.
        scores: Their scores `[N]`.
        terms: Scores `[N]` by term; empty where the reward model alone has scored.
    """

    rows: Sequence[ResponseRow]
    scores: list[float]
    terms: dict[str, list[float]]

    def summary(self) -> dict[str, Any]:
        """Number, mean and standard deviation of the scores, and the mean of each term."""
        return {
            "count": len(self.scores),
            "mean": fmean(self.scores),
            "std": pstdev(self.scores),
            "terms": {name: fmean(values) for name, values in self.terms.items()},
        }

    def write(self, to: Path) -> None:
        """Write a JSONL file, completely or not at all: each row with its `score` and, by name, its `terms`."""
        lines = []
        for i, (row, score) in enumerate(zip(self.rows, self.scores, strict=True)):
            scored = {**row.values, "score": score}
            if self.terms:
                scored["terms"] = {name: values[i] for name, values in self.terms.items()}
            lines.append(json.dumps(scored, ensure_ascii=False, default=str) + "\n")
        try:
            write_text(to, "".join(lines))
        except OSError as error:
            raise UserError(f"--to {to} cannot be written: {error.strerror}") from None


def check_target(to: Path, replace: bool) -> None:
    """Raise UserError where a file cannot be written, before anything is scored."""
    if to.is_dir():
        raise UserError(f"--to {to} is a folder: name a file in it")
    if to.exists() and not replace:
        raise UserError(f"--to {to} already exists: choose a new file, or add --replace")
    if not to.parent.is_dir():
        raise UserError(f"--to {to}: there is no folder {to.parent}")


def score_file(trained: TrainedRun, file: Path, model_only: bool, tell: Callable[[str], None]) -> FileScores:
    """Score the responses in a file.

    Args:
        trained: The run whose reward scores.
        file: Rows with `prompt` and `response` or `completion`, or with `messages` that end with the assistant's.
        model_only: Score by the reward model alone instead of the reward as a whole.
        tell: Is told which columns the scores replace, and how columns are read.

    Raises:
        UserError: A row cannot be scored, with its file and line; or the run has no reward yet.
    """
    needed = [] if model_only else _needed_columns(trained)
    positions = context_length(trained.experiment)

    def parse(values: Mapping[str, Any]) -> ResponseRow:
        row = parse_response(values)
        _check_columns(row, needed)
        _check_tokens(trained, row, positions)
        return row

    rows = parse_rows(read_rows(SourceSettings(path=str(file)), tell), parse, "error", can_skip=False).items
    for name in ADDED:
        if any(name in row.values for row in rows):
            tell(f"{file}: its own `{name}` is replaced")
    prompts = [row.prompt for row in rows]
    responses = [row.response for row in rows]
    if model_only:
        return FileScores(rows, trained.score_by_model(prompts, responses, [row.columns for row in rows]), {})
    scores, terms = trained.score_terms(prompts, responses, [row.columns for row in rows])
    return FileScores(rows, scores, terms)


def parse_response(values: Mapping[str, Any]) -> ResponseRow:
    """Parse a row with a response; raises ValueError where it has none."""
    if fields.has(values, "messages") and not fields.has(values, "prompt"):
        *prompt, reply = fields.messages(values["messages"], "messages")
        if not prompt or reply["role"] != ASSISTANT:
            raise ValueError("`messages` must be a prompt and, last, a reply by the assistant")
        return ResponseRow(values, prompt, reply["content"], _other_columns(values, "messages"))
    prompt_value = fields.prompt(values)
    name = "completion" if fields.has(values, "completion") and not fields.has(values, "response") else "response"
    if not fields.has(values, name):
        raise ValueError("no `response` and no `completion`")
    value = values[name]
    response = value if value == "" else fields.reply(value, name)  # a policy may end at once
    return ResponseRow(values, prompt_value, response, _other_columns(values, "prompt", name))


def _other_columns(values: Mapping[str, Any], *used: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in used}


def _needed_columns(trained: TrainedRun) -> list[tuple[str, str]]:
    """The columns that terms read, each with the name of its term."""
    needed = []
    for name, term in trained.experiment.reward.terms.items():
        for column in term.columns:
            needed.append((column, name))
    return needed


def _check_columns(row: ResponseRow, needed: Sequence[tuple[str, str]]) -> None:
    for column, term in needed:
        if not fields.has(row.columns, column):
            raise ValueError(f"no `{column}`, which reward.terms.{term} reads")


def _check_tokens(trained: TrainedRun, row: ResponseRow, positions: int | None) -> None:
    """Raise ValueError where the tokenizer refuses the texts, or the model has no room for them."""
    exchange = trained.encoder.exchange(row.prompt, row.response, fields.tools(row.columns, row.prompt))
    tokens = len(exchange.prompt_ids) + len(exchange.response_ids)
    if positions is not None and tokens > positions:
        raise ValueError(f"{tokens} tokens are more than the model's context length, {positions}")
