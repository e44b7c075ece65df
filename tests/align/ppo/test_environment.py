"""Replies of an environment in the responses of the policy."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from align.ppo.environment import EnvironmentPool
from policies.build import make_trunk
from policies.errors import UserError
from policies.schema import PolicySettings
from policies.text.encoder import TextEncoder
from policies.text.tokenization import decode_response
from rewards.calls import InProcess
from rewards.replies import read_replies
from rewards.user_functions import Failure
from rollouts.engine import Sampling
from rollouts.pool import LocalPool
from rollouts.schema import RolloutSettings
from rollouts.trajectory import Request, Trajectory
from rollouts.transformers_engine import SAMPLER_ROLE, make_transformers_engine

SAMPLING = Sampling(temperature=1.0, max_new_tokens=60)
REQUESTS = [Request("p", (5, 6, 7 + seed), seed, {"limit": seed % 3}) for seed in range(12)]
REPLY = "=4e"
"""It ends with the stop string, which only the policy's own text may be ended by."""


class Replies:
    """Calls a function that returns replies, as a process of its own would."""

    parallel = 1

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def parts(self, batch: Any) -> list[range]:
        return [range(len(batch))]

    def call(self, batches: Sequence[Any]) -> list[list[Any] | Failure]:
        return [
            read_replies(self.function(batch.prompts, batch.responses, batch.columns), batch.responses)
            for batch in batches
        ]

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> LocalPool:
    """An engine that ends responses at the letter e."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    trunk = make_trunk(base, PolicySettings(rank=2), (SAMPLER_ROLE,))
    return LocalPool(make_transformers_engine(trunk, tiny_tokenizer, RolloutSettings(stop=["e"])), chunk_size=5)


def reply_until_limit(
    prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Mapping[str, Any]]
) -> list[str | None]:
    """As many replies as the row says."""
    rows = zip(responses, columns, strict=True)
    return [REPLY if response.count(REPLY) < row["limit"] else None for response, row in rows]


def generate(plain: LocalPool, tokenizer: PreTrainedTokenizerFast, function: Callable[..., Any]) -> list[Trajectory]:
    return EnvironmentPool(plain, Replies(function), TextEncoder(tokenizer)).generate(REQUESTS, SAMPLING)


def test_the_policy_continues_after_each_reply(plain: LocalPool, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    reply = tuple(TextEncoder(tiny_tokenizer).continuation(REPLY))
    before = plain.generate(REQUESTS, SAMPLING)
    after = generate(plain, tiny_tokenizer, reply_until_limit)
    replied = 0
    for request, first, whole in zip(REQUESTS, before, after, strict=True):
        assert whole.request is request
        assert whole.response_ids[: first.length] == first.response_ids
        assert len(whole.sampler_logprobs) == len(whole.versions) == whole.length <= SAMPLING.max_new_tokens
        assert len(whole.inserted) <= request.columns["limit"]
        turn_start = 0
        for start, end in whole.inserted:
            assert whole.response_ids[start:end] == reply
            assert not whole.sampler_logprobs[start:end].any()
            assert "e" in decode_response(tiny_tokenizer, whole.response_ids[turn_start:start])
            assert "e" not in decode_response(tiny_tokenizer, whole.response_ids[turn_start : start - 1])
            turn_start = end
        last = decode_response(tiny_tokenizer, whole.response_ids[turn_start:])
        if whole.ended:
            assert "e" in last or whole.response_ids[-1] == tiny_tokenizer.eos_token_id
            assert len(whole.inserted) == request.columns["limit"]
        replied += len(whole.inserted)
    assert replied > len(REQUESTS) / 2


def test_a_reply_without_room_truncates_the_response(plain: LocalPool, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def reply_at_length(prompts: Sequence[str], *others: object) -> list[str]:
        return ["A long answer. " * 20] * len(prompts)

    responses = generate(plain, tiny_tokenizer, reply_at_length)
    before = plain.generate(REQUESTS, SAMPLING)
    assert [whole.response_ids for whole in responses] == [first.response_ids for first in before]
    assert any(first.ended for first in before)
    assert not any(whole.ended for whole in responses)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("text", "returned 'text'; a list with one text or None per response was expected"),
        (["a"], "returned 1 replies to 2 responses"),
        (["a", ""], "returned '' as the reply to 'r2'"),
        (["a", 3], "returned 3 as the reply to 'r2'"),
    ],
)
def test_what_is_no_reply_is_refused(result: Any, message: str) -> None:
    failure = read_replies(result, ["r1", "r2"])
    assert isinstance(failure, Failure)
    assert str(failure).startswith(message)


def test_a_function_that_fails_is_named(plain: LocalPool, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def fail(*arguments: Any) -> list[float]:
        raise RuntimeError("the tool is down")

    pool = EnvironmentPool(plain, InProcess(fail), TextEncoder(tiny_tokenizer), "rollouts.environment: f.py:fail")
    with pytest.raises(UserError, match=r"rollouts.environment: f.py:fail raised RuntimeError: the tool is down"):
        pool.generate(REQUESTS, SAMPLING)
