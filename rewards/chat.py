"""A language model behind an OpenAI-compatible endpoint."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rewards.http import post

if TYPE_CHECKING:
    from requests import Session


@dataclass(frozen=True)
class ChatEndpoint:
    """Sends messages to a model and returns its replies, which are greedy.

    Attributes:
        session: Retries, and knows the key.
        url: Base URL, without /chat/completions.
        model: The model's name there.
        max_tokens: Largest length of a reply.
        timeout: Seconds that one request may take; None: no limit.
    """

    session: "Session"
    url: str
    model: str
    max_tokens: int
    timeout: float | None

    def reply(self, message: str) -> Any:
        """What the model replies to a message of the user.

        Raises:
            ValueError: The endpoint returns no message.
            requests.RequestException: The request fails.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": message}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        completion = post(self.session, f"{self.url.rstrip('/')}/chat/completions", body, self.timeout)
        try:
            return completion["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{self.url} returned {str(completion)[:80]!r}, which contains no message") from None
