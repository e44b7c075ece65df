"""The settings of the stage `classify`."""

from typing import Literal

from pydantic import Field

from rewards.schema import FitSettings

LabelTask = Literal["classification", "regression"]


class ClassifySettings(FitSettings):
    """A classifier or a regression model: a linear head on the hidden state of a text's last token."""

    task: LabelTask | None = Field(
        None,
        description="classification: text or integers are classes; regression: labels are numbers; unset: regression "
        "if any training label is a number with a decimal point, classification otherwise",
    )
    trains: Literal["adapter", "head"] = Field(
        "adapter",
        description="what policy.method trains, with the head; or the head alone, on the SFT model's hidden states",
    )
    verbalizers: dict[str, str] = Field(
        default_factory=dict,
        description="CLASS: a word of one token for each class, such as ` good`; the head's row of the class starts as "
        "the language model's of this word. Unset: rows start at random",
    )
