"""Labelled texts, and what their labels mean: classes or numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from align.config.classify_settings import LabelTask
from policies.errors import UserError
from policies.text.columns import shown
from policies.text.tokenization import Prompt

Label = str | int | float
"""A class, as text or an integer, or the number that a regression predicts."""

MAX_NAMED = 12
"""Classes that a message names: more would hide the rest of it."""


class Labelled(Protocol):
    """Anything with a label."""

    @property
    def label(self) -> Label:
        """Its label."""


@dataclass(frozen=True)
class LabelledText:
    """A text as token ids, and its label.

    Attributes:
        text: The text, or messages.
        ids: Its tokens; the head reads the hidden state of the last one.
        label: Its label.
    """

    text: Prompt
    ids: list[int]
    label: Label

    @property
    def length(self) -> int:
        """Number of tokens in its forward pass."""
        return len(self.ids)


@dataclass(frozen=True)
class Classes:
    """The classes of a classification task.

    Attributes:
        labels: The label of each class, in order: all text or all integers.
    """

    labels: tuple[str, ...] | tuple[int, ...]

    @property
    def outputs(self) -> int:
        """Number of outputs of a head: a logit for each class."""
        return len(self.labels)

    @property
    def names(self) -> list[str]:
        """The classes as text."""
        return [str(label) for label in self.labels]

    def check(self, label: Label) -> None:
        """Raise ValueError where a label is none of the classes."""
        if not any(type(label) is type(known) and label == known for known in self.labels):
            raise ValueError(f"label {shown(label)} is not one of the training labels: {_named(self.labels)}")

    def targets(self, examples: Sequence[Labelled]) -> list[int]:
        """The number of each example's class."""
        labels: Sequence[Label] = self.labels
        numbers = {label: number for number, label in enumerate(labels)}
        return [numbers[example.label] for example in examples]


@dataclass(frozen=True)
class Numbers:
    """The scale of the numbers that a regression predicts.

    Attributes:
        mean: Mean of the training labels.
        std: Their standard deviation.
    """

    mean: float
    std: float

    @property
    def outputs(self) -> int:
        """Number of outputs of a head."""
        return 1

    def check(self, label: Label) -> None:
        """Raise ValueError where a label is not a number."""
        if isinstance(label, str):
            raise ValueError(f"label {shown(label)} is text; a number was expected, as in the training data")

    def targets(self, examples: Sequence[Labelled]) -> list[float]:
        """Each example's label in standard deviations from the mean."""
        return [(float(example.label) - self.mean) / self.std for example in examples]


LabelSpace = Classes | Numbers

_CLASSES = TypeAdapter(Classes)
_NUMBERS = TypeAdapter(Numbers)


def verbalizer_ids(
    verbalizers: Mapping[str, str], space: LabelSpace, tokenizer: PreTrainedTokenizerBase
) -> list[int] | None:
    """The token of each class's word, in the order of the classes; None without verbalizers.

    Raises:
        UserError: There are no classes, a class has no word, a word belongs to no class, or it is not one token.
    """
    if not verbalizers:
        return None
    if not isinstance(space, Classes):
        raise UserError("classify.verbalizers: the labels are numbers, which have no words")
    if verbalizers.keys() != set(space.names):
        raise UserError(
            f"classify.verbalizers: words for the classes {_named(list(verbalizers))}; the training labels are "
            f"{_named(space.labels)}"
        )
    tokens = {name: tokenizer(verbalizers[name], add_special_tokens=False)["input_ids"] for name in space.names}
    for name, ids in tokens.items():
        if len(ids) != 1:
            raise UserError(
                f"classify.verbalizers.{name}: {verbalizers[name]!r} is {len(ids)} tokens; a word of one token is "
                "needed (most tokenizers have more of them with a space in front)"
            )
    return [ids[0] for ids in tokens.values()]


def label_space(labels: Sequence[Label], task: LabelTask | None) -> LabelSpace:
    """What the labels of training data mean.

    Args:
        labels: The labels, checked for the task by `labelled_text_parser`.
        task: The task; None: regression if any label is a float, classification otherwise.

    Raises:
        ValueError: Labels are both text and numbers, or all the same, or no two rows share a class.
    """
    kinds = {type(label) for label in labels}
    if str in kinds and len(kinds) > 1:
        text = next(label for label in labels if isinstance(label, str))
        number = next(label for label in labels if not isinstance(label, str))
        raise ValueError(f"labels are both text, such as {shown(text)}, and numbers, such as {number}: use one kind")
    if task == "regression" or (task is None and float in kinds):
        numbers = [float(label) for label in labels]
        std = pstdev(numbers)
        if std == 0:
            raise ValueError(f"all labels are {numbers[0]:g}: there is nothing to learn")
        return Numbers(fmean(numbers), std)
    classes = Classes(tuple(sorted(set(labels))))  # type: ignore[arg-type]
    if classes.outputs < 2:
        raise ValueError(f"all labels are {_named(classes.labels)}: a classifier needs two classes")
    if classes.outputs == len(labels) > 2:
        raise ValueError("no two rows have the same label: for numbers, set classify.task to regression")
    return classes


def describe_space(space: LabelSpace, examples: Sequence[LabelledText]) -> str:
    """The classes with their shares of some examples, or the scale of the numbers: a line for the plan."""
    if isinstance(space, Numbers):
        return f"regression; labels have mean {space.mean:.4g} and standard deviation {space.std:.4g}"
    counts = Counter(example.label for example in examples)
    shares = [f"{label} {counts[label] / len(examples):.1%}" for label in space.labels[:MAX_NAMED]]
    further = space.outputs - len(shares)
    more = f" and {further} more" if further else ""
    return f"{space.outputs} classes: {', '.join(shares)}{more}"


def space_record(space: LabelSpace) -> dict[str, Any]:
    """What a label space is, as JSON values."""
    if isinstance(space, Classes):
        return {"classes": list(space.labels)}
    return {"regression": asdict(space)}


def read_space(record: dict[str, Any], source: object) -> LabelSpace:
    """The label space that `space_record` recorded. Raises UserError, naming the source, where it is none."""
    try:
        if "classes" in record:
            return _CLASSES.validate_python({"labels": record["classes"]})
        return _NUMBERS.validate_python(record["regression"])
    except (KeyError, ValidationError) as error:
        raise UserError(f"{source} is damaged: neither `classes` nor `regression` was found in it") from error


def _named(labels: Sequence[Label]) -> str:
    """The first labels, for messages."""
    names = [shown(label) for label in labels[:MAX_NAMED]]
    return ", ".join(names + ["…"] * (len(labels) > MAX_NAMED))
