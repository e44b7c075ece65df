from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from align.config.schema import PromptStyleSettings
from align.evaluation.prompt_styles import PromptStyle, styled
from policies.text.encoder import TextEncoder
from policies.text.tokenization import decode_response
from rollouts.trajectory import Request, Trajectory

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
    request = PromptStyle(PromptStyleSettings(suffix=" and blue"), TextEncoder(tiny_tokenizer)).ask(request)
    assert (request.prompt, request.seed, request.columns) == ("red and blue", 7, {"answer": "blue"})
    assert list(request.prompt_ids) == tiny_tokenizer("red and blue")["input_ids"]


def test_passages_stand_right_before_the_prompt() -> None:
    settings = PromptStyleSettings.model_validate({"system": "Add.", "examples": [SHOT], "suffix": " Think."})
    passages = ["One.", "Two."]
    assert styled("3+3?", settings, passages) == "Add.\n\n2+2? 4\n\nOne.\n\nTwo.\n\n3+3? Think."
    messages = styled([{"role": "user", "content": "3+3?"}], settings, passages)
    assert messages[-1] == {"role": "user", "content": "One.\n\nTwo.\n\n3+3? Think."}


def test_the_prompt_asks_for_its_passages(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    for name, text in {"cats": "The cat sat on the mat.", "dogs": "A dog ran to the door."}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    settings = PromptStyleSettings.model_validate({"retrieval": {"documents": str(tmp_path), "passages": 1}})
    style = PromptStyle(settings, TextEncoder(tiny_tokenizer))
    assert style.ask(Request("Where did the dog run?", (1,), 0)).prompt == (
        "A dog ran to the door.\n\nWhere did the dog run?"
    )
    assert style.ask(Request("What is blue?", (1,), 0)).prompt == "What is blue?"


def response_of(tokenizer: PreTrainedTokenizerBase, text: str) -> Trajectory:
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return Trajectory(Request("", (1,), 0), tuple(ids), torch.arange(len(ids)).float(), True, (0,) * len(ids))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("two dog. Answer: red. Answer: blue", " blue"),
        ("two dog", "two dog"),  # no answer begins
        ("two dog Answer:", ""),  # it ends at once: the token that ends the response is the answer
    ],
)
def test_what_comes_before_the_answer_is_not_scored(
    tiny_tokenizer: PreTrainedTokenizerBase, text: str, answer: str
) -> None:
    style = PromptStyle(PromptStyleSettings(answer_after="Answer:"), TextEncoder(tiny_tokenizer))
    whole = response_of(tiny_tokenizer, text)
    kept = style.answer(whole)
    assert decode_response(tiny_tokenizer, kept.response_ids) == answer
    assert kept.response_ids == whole.response_ids[-kept.length :]
    assert kept.sampler_logprobs.tolist() == list(range(whole.length - kept.length, whole.length))
    assert len(kept.versions) == kept.length
    assert kept.ended


def test_a_response_that_is_cut_off_at_the_mark_is_scored_whole(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    style = PromptStyle(PromptStyleSettings(answer_after="Answer:"), TextEncoder(tiny_tokenizer))
    ended = response_of(tiny_tokenizer, "two Answer:")
    cut = replace(ended, response_ids=ended.response_ids[:-1], ended=False)
    assert style.answer(cut) == cut
