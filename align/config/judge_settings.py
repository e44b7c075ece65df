"""The settings of a judge that compares the responses of two runs."""

from string import Formatter
from typing import Literal

from pydantic import Field, model_validator

from policies.schema import Settings, unread_settings
from rewards.http import ConnectionSettings

FIELDS = ("prompt", "first", "second", "criterion")
"""What the instruction to a judge has to name."""


class CriterionSettings(Settings):
    """A criterion of a rubric."""

    description: str = Field(description="what the judge is told to compare by")
    weight: float = Field(1.0, gt=0, description="its share of the win rate is proportional to this")


class JudgeSettings(ConnectionSettings):
    """A language model as a judge of two responses (LLM as a judge)."""

    model: str = Field(description="its name at the endpoint; without url: folder or hub name of a model to load")
    url: str | None = Field(
        None, description="base URL of an OpenAI-compatible endpoint, without /chat/completions; unset: load the model"
    )
    instruction: str = Field(
        "Two assistants have responded to the same prompt. {criterion}\n\n"
        "<prompt>\n{prompt}\n</prompt>\n<response_a>\n{first}\n</response_a>\n<response_b>\n{second}\n</response_b>\n\n"
        "Compare the responses, whatever their order. End with [[A]] if response A is better, [[B]] if response B is, "
        "or [[C]] for a tie.",
        description="message to the judge; {criterion}, {prompt}, {first} and {second} are filled in",
    )
    rubric: dict[str, CriterionSettings] = Field(
        {"overall": CriterionSettings(description="Judge how helpful, correct and harmless each response is.")},
        min_length=1,
        description="NAME: a criterion; each is judged on its own",
    )
    on_no_verdict: Literal["error", "tie"] = Field(
        "error", description="a reply without [[A]], [[B]] or [[C]] is an error, or a tie, and counted"
    )
    parallel: int = Field(8, ge=1, description="concurrent requests to the endpoint")
    max_tokens: int = Field(512, ge=1, description="largest length of the judge's reply")

    @model_validator(mode="after")
    def _is_usable(self) -> "JudgeSettings":
        try:
            named = {name for _, name, _, _ in Formatter().parse(self.instruction) if name is not None}
        except ValueError as error:
            raise ValueError(f"instruction: {error}; write a literal brace twice") from None
        for name in FIELDS:
            if name not in named:
                raise ValueError(f"instruction has no {{{name}}}, which the judge needs to see")
        for name in named.difference(FIELDS):
            raise ValueError(f"instruction names {{{name}}}; the fields are {', '.join(FIELDS)}")
        for name in self.rubric:
            if not name.isidentifier():
                raise ValueError(f"rubric: {name!r} is not a valid name: letters, digits and _ were expected")
        return self

    @model_validator(mode="after")
    def _reads_its_settings(self) -> "JudgeSettings":
        for name in ("timeout", "retries", "key_env", "parallel"):
            if self.url is None and getattr(self, name) != type(self).model_fields[name].default:
                raise unread_settings(f"`{name}` has no effect without `url`: the model is loaded here", name)
        return self
