"""What the choice of a technique depends on."""

from dataclasses import dataclass, field
from typing import Literal

TaskName = Literal["classify", "respond", "facts", "domain", "prefer"]
TASKS: dict[TaskName, str] = {
    "classify": "put texts into classes, or give them a number",
    "respond": "respond as demonstrations do: a format, a style, following instructions",
    "facts": "answer from documents whose facts the model does not know, or which change",
    "domain": "write and read the language of a field, such as law or a dialect",
    "prefer": "give responses that people, or a check, rate better",
}
"""The tasks, each with what it is, for help and documentation."""

RowKind = Literal["labels", "demonstrations", "texts", "preferences", "verdicts", "ratings", "prompts", "answers"]
ROW_KINDS: dict[RowKind, str] = {
    "labels": "labelled texts",
    "demonstrations": "demonstrations",
    "texts": "plain texts",
    "preferences": "comparisons of responses",
    "verdicts": "responses rated 0 or 1",
    "ratings": "responses rated on a scale",
    "prompts": "prompts",
    "answers": "prompts with an answer to check",
}
"""The kinds of rows, each as people call it."""


@dataclass(frozen=True)
class Facts:
    """What a rule may ask about.

    Attributes:
        task: What the model is to do.
        parameters: Parameters of the base model.
        rows: Number of rows of each kind; 0 where it is missing.
        classes: Number of classes of the labels; 0: the labels are numbers, or there are none.
        text_tokens: Tokens of the plain texts, estimated from a sample of them.
        full_fits: Whether the machine has memory to train all weights, by the plan.
        rlhf_fits: Whether it has memory for a reward model and PPO, by the plan.
    """

    task: TaskName
    parameters: int
    rows: dict[RowKind, int] = field(default_factory=dict)
    classes: int = 0
    text_tokens: int = 0
    full_fits: bool = False
    rlhf_fits: bool = False

    def count(self, kind: RowKind) -> int:
        """Number of rows of a kind."""
        return self.rows.get(kind, 0)

    @property
    def labels_per_class(self) -> float:
        """Mean number of labelled texts of a class; labels that are numbers count as two classes, low and high."""
        return self.count("labels") / (self.classes or 2)
