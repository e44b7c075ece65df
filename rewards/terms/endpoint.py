"""A scorer behind an HTTP endpoint as a term."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from rewards.http import HttpSettings, open_session, post
from rewards.user_functions import ScoreFunction


class EndpointTerm(HttpSettings):
    """Score by a service at `url`: POST {prompts, responses, columns} returns {scores}."""

    kind: Literal["endpoint"]
    url: str
    batch_size: int = Field(64, ge=1, description="responses per request")

    def make_function(self, name: str) -> ScoreFunction:
        """A function that sends `batch_size` responses per request. Raises UserError where `key_env` is not set."""
        session = open_session(self)

        def score(
            prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Mapping[str, Any]]
        ) -> list[float]:
            scores: list[float] = []
            for start in range(0, len(prompts), self.batch_size):
                batch = slice(start, start + self.batch_size)
                body = {
                    "prompts": prompts[batch],
                    "responses": responses[batch],
                    "columns": [dict(row) for row in columns[batch]],
                }
                reply = post(session, self.url, body, self.timeout)
                if not isinstance(reply, dict) or not isinstance(reply.get("scores"), list):
                    raise ValueError(f"{self.url} returned {str(reply)[:80]!r}; {{scores: [...]}} was expected")
                scores += reply["scores"]
            return scores

        score.__name__ = f"the scorer at {self.url}"
        return score
