from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from policies.build import make_trunk
from policies.schema import PolicySettings
from rollouts.engine import Sampling
from rollouts.schema import RolloutSettings
from rollouts.stop_strings import StopStrings
from rollouts.trajectory import Request
from rollouts.transformers_engine import SAMPLER_ROLE, make_transformers_engine


@pytest.mark.parametrize("text", ["a short answer.", "blue is a colour, and so is é!", "\n\nUser:"])
def test_a_response_ends_with_the_token_that_completes_a_string(
    text: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = tiny_tokenizer("The cat sat. " + text + " and more", add_special_tokens=False)["input_ids"]
    stops = StopStrings([text[-4:]], tiny_tokenizer)
    end = next(count for count in range(1, len(tokens) + 1) if stops(tokens[:count]))
    assert text[-4:] in tiny_tokenizer.decode(tokens[:end])
    assert text[-4:] not in tiny_tokenizer.decode(tokens[: end - 1])


def test_a_string_before_the_start_is_not_the_policys(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tiny_tokenizer("a long answer. b", add_special_tokens=False)["input_ids"]
    stops = StopStrings(["answer."], tiny_tokenizer)
    assert stops(tokens)
    assert not stops(tokens, start=len(tokens) - 2)


def test_the_engine_ends_responses_at_stop_strings(tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    trunk = make_trunk(base, PolicySettings(rank=2), (SAMPLER_ROLE,))
    plain = make_transformers_engine(trunk, tiny_tokenizer, RolloutSettings())
    stopping = make_transformers_engine(trunk, tiny_tokenizer, RolloutSettings(stop=["e", "the"]))
    requests = [Request("p", (5, 6, 7 + seed), seed) for seed in range(20)]
    full = plain.generate(requests, Sampling(1.0, 30))
    stopped = stopping.generate(requests, Sampling(1.0, 30))
    for before, after in zip(full, stopped, strict=True):
        assert before.response_ids[: after.length] == after.response_ids
        text = tiny_tokenizer.decode(list(after.response_ids))
        should_end = "e" in text or after.response_ids[-1] == tiny_tokenizer.eos_token_id
        assert after.ended is should_end
        assert "e" not in tiny_tokenizer.decode(list(after.response_ids[:-1]))
    assert sum(t.length for t in stopped) < sum(t.length for t in full)
