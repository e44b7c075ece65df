"""A language model as a judge: its grade as a term."""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from string import Formatter
from typing import Any, Literal

from pydantic import Field, model_validator

from rewards.chat import ChatEndpoint
from rewards.http import HttpSettings, open_session
from rewards.user_functions import ScoreFunction

GRADE = re.compile(r"[-+]?\d+(?:\.\d+)?")
DENOMINATOR = re.compile(r"/\s*\d+(?:\.\d+)?")
"""The second part of a grade such as "8/10", which counts as 8."""


class JudgeTerm(HttpSettings):
    """Grade by a language model (LLM as a judge) behind an OpenAI-compatible endpoint: the last number of its reply,
    mapped from `scale` to 0 to 1.
    """

    kind: Literal["judge"]
    url: str = Field(description="base URL, without /chat/completions")
    model: str
    instruction: str = Field(
        "Grade the response to the prompt from 0 (useless or harmful) to 10 (perfect).\n\n"
        "<prompt>\n{prompt}\n</prompt>\n<response>\n{response}\n</response>\n\nAnswer with the grade alone.",
        description="message to the judge; {prompt}, {response} and the names of the rows' columns are filled in",
    )
    scale: tuple[float, float] = Field((0.0, 10.0), description="[worst, best] grade, mapped to [0, 1]")
    parallel: int = Field(8, ge=1, description="concurrent requests")
    max_tokens: int = Field(64, ge=1, description="largest length of the judge's reply")

    @model_validator(mode="after")
    def _is_usable(self) -> "JudgeTerm":
        try:
            list(Formatter().parse(self.instruction))
        except ValueError as error:
            raise ValueError(f"instruction: {error}; write a literal brace twice") from None
        if "{response}" not in self.instruction:
            raise ValueError("instruction has no {response}: the judge would not see the response")
        if self.scale[0] == self.scale[1]:
            raise ValueError("scale: two different grades, [worst, best], were expected")
        return self

    @property
    def columns(self) -> list[str]:
        """The columns that the instruction names."""
        names = [name for _, name, _, _ in Formatter().parse(self.instruction) if name is not None]
        return [name for name in names if name not in ("prompt", "response")]

    def make_function(self, name: str) -> ScoreFunction:
        """A function that lets the judge grade responses. Raises UserError where the variable `key_env` is not set."""
        endpoint = ChatEndpoint(
            session=open_session(self),
            url=self.url,
            model=self.model,
            max_tokens=self.max_tokens,
            timeout=self.timeout,
        )
        judge = Judge(self, endpoint)

        def score(
            prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Mapping[str, Any]]
        ) -> list[float]:
            instructions: list[str] = []
            for prompt, response, row in zip(prompts, responses, columns, strict=True):
                fields = {**row, "prompt": prompt, "response": response}
                instructions.append(fill(self.instruction, fields))
            return judge.grades(instructions)

        score.__name__ = f"the judge {self.model}"
        return score


class Judge:
    """Lets a language model grade instructions. Each instruction is sent only once per process."""

    def __init__(self, settings: JudgeTerm, endpoint: ChatEndpoint) -> None:
        self.settings = settings
        self.endpoint = endpoint
        self.graded: dict[str, float] = {}

    def grades(self, instructions: Sequence[str]) -> list[float]:
        """The grade of each instruction, mapped to [0, 1]. Raises ValueError where a reply contains none."""
        new = [instruction for instruction in dict.fromkeys(instructions) if instruction not in self.graded]
        with ThreadPoolExecutor(self.settings.parallel) as pool:
            list(pool.map(self._grade, new))
        return [self.graded[instruction] for instruction in instructions]

    def _grade(self, instruction: str) -> None:
        scale = self.settings.scale
        worst, best = scale
        reply = self.endpoint.reply(instruction)
        numbers = GRADE.findall(DENOMINATOR.sub("", reply or ""))
        if not numbers:
            raise ValueError(f"the judge gave no grade: {reply!r}")
        grade = float(numbers[-1])
        if not min(scale) <= grade <= max(scale):
            raise ValueError(f"the judge gave {grade:g}, which is not within scale {list(scale)}")
        self.graded[instruction] = (grade - worst) / (best - worst)


def fill(instruction: str, fields: Mapping[str, Any]) -> str:
    """An instruction with its fields filled in by name; braces in the values are plain text."""
    parts: list[str] = []
    for text, name, _, _ in Formatter().parse(instruction):
        parts.append(text)
        if name is None:
            continue
        if name not in fields:
            raise KeyError(f"the instruction names the field {name!r}, and the row has {', '.join(fields)}")
        parts.append(str(fields[name]))
    return "".join(parts)
