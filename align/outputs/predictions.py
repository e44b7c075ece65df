"""Labels texts by the classifier or regression model of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from align.data.examples import complete_ids
from align.data.labels import Classes, Label
from align.roles.text_classifier import TextClassifier
from policies.errors import UserError
from policies.text.encoder import TextEncoder
from policies.text.tokenization import Prompt


@dataclass(frozen=True)
class Prediction:
    """The label of a text.

    Attributes:
        label: The likeliest class, or the number.
        probabilities: The probability of each class; empty for a number.
    """

    label: Label
    probabilities: dict[Label, float] = field(default_factory=dict)


def predict_labels(model: TextClassifier, encoder: TextEncoder, texts: Sequence[Prompt]) -> list[Prediction]:
    """Label texts.

    Args:
        model: The classifier or regression model.
        encoder: Of the base model's tokenizer.
        texts: Texts, or lists of messages.

    Raises:
        UserError: A text cannot be encoded.
    """
    encoded = []
    for number, text in enumerate(texts, start=1):
        try:
            encoded.append(complete_ids(encoder, text))
        except ValueError as error:
            raise UserError(f"text {number}: {error}") from error
    outputs = model.outputs(encoded)  # [N, C]
    space = model.space
    if not isinstance(space, Classes):
        return [Prediction(space.mean + space.std * number) for number in outputs.squeeze(-1).tolist()]
    predictions = []
    for probabilities in outputs.softmax(-1).tolist():
        by_label: dict[Label, float] = dict(zip(space.labels, probabilities, strict=True))
        predictions.append(Prediction(max(by_label, key=by_label.__getitem__), by_label))
    return predictions
