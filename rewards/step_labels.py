"""Solutions in steps with a label for each step, parsed from rows of data; and where steps end in a text."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from policies.text import columns as fields
from policies.text.tokenization import Prompt

THRESHOLD = 0.5
"""A step is taken for right where its label, or its predicted probability, is at least this."""


@dataclass(frozen=True)
class LabelledSteps:
    """A prompt, and a response in steps.

    Attributes:
        prompt: Text or messages.
        steps: The text of each step.
        labels: For each step the probability that it is right, 0 or 1 where that is known, or any other number; None
            where it is not labelled. At least one is labelled.
        is_complete: Whether the response ends with the last step; otherwise more steps may follow.
    """

    prompt: Prompt
    steps: tuple[str, ...]
    labels: tuple[float | None, ...]
    is_complete: bool = False

    def text(self, separator: str) -> str:
        """The response: its steps, with the separator after each that another one may follow."""
        joined = separator.join(self.steps)
        return joined if self.is_complete else joined + separator


@dataclass(frozen=True)
class LabelScale:
    """What the labels of a data set are.

    Attributes:
        are_probabilities: Whether all are from 0 to 1; otherwise they are numbers of any size.
        mean: Mean of the numbers; 0 for probabilities.
        std: Their standard deviation, 1 where they are all equal; 1 for probabilities.
    """

    are_probabilities: bool = True
    mean: float = 0.0
    std: float = 1.0


def label_scale(examples: Sequence[LabelledSteps]) -> LabelScale:
    """The scale of the labels of training data."""
    labels: list[float] = []
    for example in examples:
        labels += [label for label in example.labels if label is not None]
    if all(0 <= label <= 1 for label in labels):
        return LabelScale()
    return LabelScale(are_probabilities=False, mean=fmean(labels), std=pstdev(labels) or 1.0)


def first_error(values: Sequence[float | None]) -> int | None:
    """The index of the first step that is wrong, by its label or its predicted probability.

    Returns:
        The index; -1 where all steps are right; None where a step without a label leaves it open.
    """
    for index, value in enumerate(values):
        if value is None:
            return None
        if value < THRESHOLD:
            return index
    return -1


def step_ends(text: str, mark: re.Pattern[str]) -> list[int]:
    """Where the steps of a text end: after the last character before each mark that is not white space.

    The last step ends with the text. Between two marks with white space alone there is no step.

    Args:
        text: A response.
        mark: Matches what stands between two steps.

    Returns:
        For each step the number of characters up to its end, increasing; empty for a text of white space.
    """
    starts = [0]
    ends: list[int] = []
    for match in mark.finditer(text):
        ends.append(match.start())
        starts.append(match.end())
    ends.append(len(text))
    found: list[int] = []
    for start, end in zip(starts, ends, strict=True):
        step = text[start:end].rstrip()
        if step:
            found.append(start + len(step))
    return found


def labelled_ends(text: str, steps: Sequence[str]) -> list[int]:
    """Where given steps end in a text that contains them, one after another.

    Returns:
        For each step the number of characters up to the last one of it that is not white space.

    Raises:
        ValueError: The text does not contain a step.
    """
    ends: list[int] = []
    end = 0
    for number, step in enumerate(steps, start=1):
        core = step.strip()
        start = text.find(core, end)
        if start < 0:
            raise ValueError(f"step {number} is not in the text that its tokens decode to: {fields.shown(core)}")
        end = start + len(core)
        ends.append(end)
    return ends


def parse_steps(values: Mapping[str, Any]) -> LabelledSteps:
    """Parse a row with `prompt`, `steps` (or `completions`, as in TRL) and `labels`; optionally `complete`.

    Args:
        values: The row by column. A label is true, false, a number, or null for a step that has none.

    Raises:
        ValueError: The row is not of this form; the message is for users.
    """
    if not fields.has(values, "steps") and not fields.has(values, "completions"):
        names = ", ".join(f"`{key}`" for key in values) or "no columns"
        advice = ""
        if fields.has(values, "chosen") or fields.has(values, "responses") or fields.has(values, "rating"):
            advice = ": a row of preferences; a reward model learns labels of steps or preferences, not both"
        raise ValueError(f"no `steps` and no `completions`; the row has {names}{advice}")
    name = "steps" if fields.has(values, "steps") else "completions"
    prompt = fields.prompt(values)
    steps = _steps(values, name)
    labels = _labels(values)
    if len(labels) != len(steps):
        raise ValueError(f"{len(labels)} `labels` for {len(steps)} `{name}`")
    if all(label is None for label in labels):
        raise ValueError("no step has a label")
    is_complete = fields.has(values, "complete") and fields.flag(values, "complete")
    return LabelledSteps(prompt=prompt, steps=steps, labels=labels, is_complete=is_complete)


def _steps(values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    listed = fields.items(values, name)
    if not isinstance(listed, list) or not listed:
        found = "an empty list" if listed == [] else fields.kind(listed)
        raise ValueError(f"`{name}` is {found}; a list of texts was expected")
    steps: list[str] = []
    for index, step in enumerate(listed):
        key = f"{name}[{index}]"
        steps.append(fields.text({key: step}, key))
    return tuple(steps)


def _labels(values: Mapping[str, Any]) -> tuple[float | None, ...]:
    listed = fields.items(values, "labels")
    if not isinstance(listed, list):
        raise ValueError(f"`labels` is {fields.kind(listed)}; a list with a label for each step was expected")
    return tuple(_label(label, f"labels[{index}]") for index, label in enumerate(listed))


def _label(value: Any, name: str) -> float | None:
    if value is None:
        return None
    return float(value) if isinstance(value, bool) else fields.number({name: value}, name)
