"""Scores over HTTP: a scorer of one's own, or a language model that grades."""

import os
import re
import string
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from policies.errors import UserError
from rewards.terms import EndpointTerm, HttpSettings, JudgeTerm
from rewards.user_functions import ScoreFunction

RETRIED = (429, 500, 502, 503, 504)
LONGEST_WAIT = 60
"""Seconds that a server may ask for between two tries."""


def endpoint(term: EndpointTerm) -> ScoreFunction:
    """Scores by POST {prompts, responses, columns}, which gives {scores}."""
    session = _session(term)

    def score(
        prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Mapping[str, Any]]
    ) -> Sequence[float]:
        scores: list[float] = []
        for start in range(0, len(prompts), term.batch_size):
            part = slice(start, start + term.batch_size)
            asked = {
                "prompts": prompts[part],
                "responses": responses[part],
                "columns": [dict(c) for c in columns[part]],
            }
            answer = _post(session, term, term.url, asked)
            if not isinstance(answer, dict) or not isinstance(answer.get("scores"), list):
                raise ValueError(f"{term.url} answered {str(answer)[:80]!r}; {{scores: [...]}} was expected")
            scores += answer["scores"]
        return scores

    score.__name__ = f"the scorer at {term.url}"
    return score


def judge(term: JudgeTerm) -> ScoreFunction:
    """Grades by a chat model. A response that was graded before in this process is not asked about again."""
    session, known = _session(term), dict[str, float]()
    worst, best = term.scale

    def grade(instruction: str) -> None:
        asked = {
            "model": term.model,
            "messages": [{"role": "user", "content": instruction}],
            "temperature": 0,
            "max_tokens": term.max_tokens,
        }
        answer = _post(session, term, f"{term.url.rstrip('/')}/chat/completions", asked)
        try:
            said = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{term.url} answered {str(answer)[:80]!r}, which holds no message") from None
        # "8/10" is a grade of 8.
        numbers = re.findall(r"[-+]?\d+(?:\.\d+)?", re.sub(r"/\s*\d+(?:\.\d+)?", "", said or ""))
        if not numbers:
            raise ValueError(f"the judge gave no grade: {said!r}")
        grade = float(numbers[-1])
        if not min(term.scale) <= grade <= max(term.scale):
            raise ValueError(f"the judge gave {grade:g}, which is not within scale {list(term.scale)}")
        known[instruction] = (grade - worst) / (best - worst)

    def score(
        prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Mapping[str, Any]]
    ) -> Sequence[float]:
        rows = zip(prompts, responses, columns, strict=True)
        asked = [_filled(term.instruction, {**row, "prompt": p, "response": r}) for p, r, row in rows]
        new = [instruction for instruction in dict.fromkeys(asked) if instruction not in known]
        with ThreadPoolExecutor(term.parallel) as pool:
            list(pool.map(grade, new))
        return [known[instruction] for instruction in asked]

    score.__name__ = f"the judge {term.model}"
    return score


def _filled(instruction: str, values: Mapping[str, Any]) -> str:
    """Fields put in by name; nothing in what is put in is taken for a field."""
    parts = string.Formatter().parse(instruction)
    try:
        return "".join(text + ("" if name is None else str(values[name])) for text, name, _, _ in parts)
    except KeyError as error:
        raise KeyError(f"the instruction asks for {error}, and the row has {', '.join(values)}") from None


def _session(term: HttpSettings) -> requests.Session:
    """Connections that try again, waiting longer each time, or as long as the server says."""
    retry = Retry(
        total=term.retries,
        backoff_factor=0.5,
        status_forcelist=RETRIED,
        allowed_methods=None,
        raise_on_status=False,
        retry_after_max=LONGEST_WAIT,
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=64))
    if term.key_env:
        if term.key_env not in os.environ:
            raise UserError(f"key_env: the environment variable {term.key_env} is not set")
        key = os.environ[term.key_env]

        def authorise(request: Any) -> Any:
            request.headers["Authorization"] = f"Bearer {key}"
            return request

        session.auth = authorise  # a header alone would give way to what ~/.netrc has for the host
    return session


def _post(session: requests.Session, term: HttpSettings, url: str, body: Mapping[str, Any]) -> Any:
    answer = session.post(url, json=body, timeout=term.timeout)
    answer.raise_for_status()
    return answer.json()
