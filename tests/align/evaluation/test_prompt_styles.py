from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from align.config.schema import PromptStyleSettings
from align.evaluation.prompt_styles import make_prompt_style, styled
from policies.text.encoder import TextEncoder
from rollouts.trajectory import Request

SHOT = {"prompt": "2+2?", "completion": " 4"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "3+3?"),
        ({"suffix": " Think."}, "3+3? Think."),
        ({"system": "Add."}, "Add.\n\n3+3?"),
        ({"system": "Add.", "examples": [SHOT, SHOT]}, "Add.\n\n2+2? 4\n\n2+2? 4\n\n3+3?"),
    ],
)
def test_text_follows_system_prompt_and_examples(settings: dict[str, Any], expected: str) -> None:
    assert styled("3+3?", PromptStyleSettings(**settings)) == expected


def test_messages_begin_with_the_system_prompt_and_examples_are_turns() -> None:
    prompt = [{"role": "system", "content": "old"}, {"role": "user", "content": "3+3?"}]
    style = PromptStyleSettings.model_validate({"system": "Add.", "examples": [SHOT], "suffix": " Think."})
    assert styled(prompt, style) == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": " 4"},
        {"role": "user", "content": "3+3? Think."},
    ]
    assert prompt[-1]["content"] == "3+3?"
    assert styled(prompt, PromptStyleSettings.model_validate({"examples": [SHOT]}))[:2] == [
        {"role": "system", "content": "old"},
        {"role": "user", "content": "2+2?"},
    ]


def test_a_styled_request_keeps_its_seed_and_columns(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    request = Request("red", (1, 2), seed=7, columns={"answer": "blue"})
    request = make_prompt_style(PromptStyleSettings(suffix=" and blue"), TextEncoder(tiny_tokenizer))(request)
    assert (request.prompt, request.seed, request.columns) == ("red and blue", 7, {"answer": "blue"})
    assert list(request.prompt_ids) == tiny_tokenizer("red and blue")["input_ids"]
