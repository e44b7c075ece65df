"""The settings of a reward's terms: what each scores a response by, and how it goes into the sum."""

import re
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from policies.schema import Settings

SECRET = re.compile("key|token|secret|passw|credential", re.IGNORECASE)
"""What is in the names of variables and parameters that hold secrets."""


class TermSettings(Settings):
    """What all terms have."""

    weight: float = Field(1.0, description="in the sum; negative: taken off")
    clip: tuple[float, float] | None = Field(None, description="[min, max] of the score, once normalised")
    normalise: Literal["no", "sft", "running"] = Field(
        "no",
        description="shift and scale to mean 0, deviation 1, of SFT responses or of all that PPO has sampled so far",
    )

    @field_validator("clip")
    @classmethod
    def _ordered(cls, clip: tuple[float, float] | None) -> tuple[float, float] | None:
        if clip and clip[0] >= clip[1]:
            raise ValueError("[min, max] was expected")
        return clip


class ModelTerm(TermSettings):
    """The reward model, or ensemble, of the reward stage."""

    kind: Literal["model"]


class CallSettings(TermSettings):
    """What calls have that may fail."""

    timeout: float | None = Field(None, gt=0, description="seconds that one call may take; unset: any")
    fallback: float | None = Field(
        None, description="score of a row that none can be had for; such rows are counted. Unset: the run stops"
    )

    @property
    def call_timeout(self) -> float | None:
        """Of a call on a whole batch."""
        return self.timeout


class ClassifierTerm(TermSettings):
    """A ready sequence-classification model, with its own tokenizer and template."""

    kind: Literal["classifier"]
    path: str


class FunctionTerm(CallSettings):
    """A function of the user's: prompts, responses and the rows' columns, to floats. It may be async."""

    kind: Literal["function"]
    function: str = Field(description="FILE.py:function or module:function")


class RegexTerm(TermSettings):
    """1 where a regular expression is found in the response, else 0."""

    kind: Literal["regex"]
    pattern: str
    full_match: bool = Field(False, description="it must match the response as a whole")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"no regular expression: {error}") from None
        return pattern


class ExactTerm(TermSettings):
    """1 where the response is the answer in a column, else 0; white space around and case do not count."""

    kind: Literal["exact"]
    column: str = "answer"


class NumberTerm(TermSettings):
    """1 where the response's final number is that of the answer in a column, else 0.

    The number behind the last `####`, else in the last box `\\boxed{}`, else behind the last `A:`, else the last one.
    """

    kind: Literal["number"]
    column: str = "answer"
    tolerance: float = Field(1e-6, ge=0, description="how far the numbers may lie apart")


class MathTerm(TermSettings):
    """1 where math-verify (`align-rlhf[math]`) finds the response's final expression equal to the answer's, else 0."""

    kind: Literal["math"]
    column: str = "answer"


class LengthTerm(TermSettings):
    """0 up to `max_tokens - window` tokens, falling to -1 at `max_tokens` and beyond (Yu et al. 2025, "DAPO", eq. 13)."""

    kind: Literal["length"]
    max_tokens: int = Field(ge=1)
    window: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "LengthTerm":
        if self.window > self.max_tokens:
            raise ValueError(f"window {self.window} is longer than max_tokens, {self.max_tokens}")
        return self


class RepetitionTerm(TermSettings):
    """Minus the share of runs of n words that stood in the response before."""

    kind: Literal["repetition"]
    n: int = Field(3, ge=1)


class JsonTerm(TermSettings):
    """1 where the response is JSON, and as the schema says where there is one, else 0."""

    kind: Literal["json"]
    schema_: dict[str, Any] | str | None = Field(
        None, alias="schema", description="a JSON schema, or a file that holds one"
    )

    model_config = Settings.model_config | {"serialize_by_alias": True}

    @field_validator("schema_")
    @classmethod
    def _is_a_schema(cls, schema: dict[str, Any] | str | None) -> dict[str, Any] | str | None:
        import json

        from jsonschema import SchemaError
        from jsonschema.validators import validator_for

        try:
            loaded = json.loads(Path(schema).read_text(encoding="utf-8")) if isinstance(schema, str) else schema
            if loaded is None and schema is None:
                return None
            if not isinstance(loaded, dict) or not isinstance(loaded.get("$schema", ""), str):
                raise ValueError("an object was expected, its $schema a name")
            validator_for(loaded).check_schema(loaded)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{schema} cannot be read: {error}") from None
        except SchemaError as error:
            raise ValueError(f"no JSON schema: {error.message}") from None
        return schema


class HttpSettings(CallSettings):
    """What calls over HTTP have."""

    timeout: float | None = Field(30.0, gt=0, description="seconds that one request may take")
    retries: int = Field(
        3, ge=0, description="further tries after a lost connection, or status 429, 500, 502, 503, 504"
    )
    key_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="the environment variable that holds the key, sent as a bearer token; never written anywhere",
    )

    @property
    def call_timeout(self) -> None:
        """None: a batch is many requests, and each has the timeout for itself."""
        return None

    @field_validator("url", check_fields=False)
    @classmethod
    def _is_http(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("an http:// or https:// address was expected")
        parts = urlsplit(url)
        if "@" in parts.netloc or SECRET.search(parts.query):
            raise ValueError("a key in an address would be written to config.yaml and W&B: use key_env")
        return url


class EndpointTerm(HttpSettings):
    """A scorer elsewhere: POST {prompts, responses, columns} gives {scores}."""

    kind: Literal["endpoint"]
    url: str
    batch_size: int = Field(64, ge=1, description="responses a request")


class JudgeTerm(HttpSettings):
    """A language model that grades, behind an endpoint of OpenAI's form; the last number of its answer is the score."""

    kind: Literal["judge"]
    url: str = Field(description="up to and without /chat/completions")
    model: str
    instruction: str = Field(
        "Grade the response to the prompt from 0 (useless or harmful) to 10 (perfect).\n\n"
        "<prompt>\n{prompt}\n</prompt>\n<response>\n{response}\n</response>\n\nAnswer with the grade alone.",
        description="what the judge is told; {prompt}, {response} and the rows' columns are put in",
    )
    scale: tuple[float, float] = Field((0.0, 10.0), description="[worst, best] grade; the score is its place, 0 to 1")
    parallel: int = Field(8, ge=1, description="requests at once")
    max_tokens: int = Field(64, ge=1, description="of the judge's answer")

    @model_validator(mode="after")
    def _usable(self) -> "JudgeTerm":
        try:
            list(Formatter().parse(self.instruction))
        except ValueError as error:
            raise ValueError(f"instruction: {error}; a brace itself is written twice") from None
        if "{response}" not in self.instruction:
            raise ValueError("instruction has no {response}: the judge would not see it")
        if self.scale[0] == self.scale[1]:
            raise ValueError("scale: [worst, best] grade was expected")
        return self


Term = Annotated[
    ModelTerm
    | ClassifierTerm
    | FunctionTerm
    | RegexTerm
    | ExactTerm
    | NumberTerm
    | MathTerm
    | LengthTerm
    | RepetitionTerm
    | JsonTerm
    | EndpointTerm
    | JudgeTerm,
    Field(discriminator="kind"),
]


def columns_of(term: TermSettings) -> list[str]:
    """The columns of a prompt's row that a term reads by name."""
    if isinstance(term, JudgeTerm):
        fields = [name for _, name, _, _ in Formatter().parse(term.instruction) if name is not None]
        return [name for name in fields if name not in ("prompt", "response")]
    return [term.column] if isinstance(term, ExactTerm | NumberTerm | MathTerm) else []


class ConstraintSettings(Settings):
    """A cost that is bounded: the reward is maximised subject to a mean cost of at most a bound.

    By a multiplier λ ≥ 0 that grows while the mean cost is above the bound: the score is (reward - λ · cost) / (1 + λ)
    (Dai et al. 2024, "Safe RLHF", eq. 9 and 10).
    """

    term: str = Field(description="the term that is the cost; it is not part of the sum")
    at_most: float = Field(description="bound of its mean")
    rate: float = Field(0.1, gt=0, description="growth of the multiplier a step, for each unit above the bound")
    start: float = Field(0.0, ge=0, description="the multiplier at first")
