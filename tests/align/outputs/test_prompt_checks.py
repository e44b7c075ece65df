"""Prompts, responses and lists of them that cannot be meant are refused with what is wrong."""

import sys
from typing import Any

import pytest

from align.cli import main
from align.outputs.chat import Chat
from align.outputs.prompt_checks import check_fits, check_lists, check_prompt, check_room, check_text
from policies.errors import UserError


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "prompt 2 is nothing; text or a list of messages was expected"),
        ({"role": "user", "content": "a"}, "prompt 2 is an object; text or a list of messages was expected"),
        ([], "prompt 2: `prompt` is .*a list of messages was expected"),
        ([{"role": "user"}], r"prompt 2: `prompt` has a message .*\{'role': 'user'\}"),
        ([{"role": "user", "content": None}], "prompt 2: `prompt` has a message .*'content': None"),
        (["a"], "prompt 2: `prompt` has a message .*'a'"),
        ("a\udcff", "prompt 2 is not UTF-8: it has the byte 0xff$"),
        ([{"role": "user", "content": "a\udc80"}], "prompt 2 is not UTF-8: it has the byte 0x80$"),
        ("a\ud800", "prompt 2 has half of a surrogate pair, which UTF-8 cannot hold$"),
    ],
)
def test_a_prompt_is_text_or_messages(prompt: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        check_prompt(prompt, "prompt 2")


def test_prompts_that_can_be_meant_are_taken() -> None:
    for prompt in ("", "é", [{"role": "user", "content": ""}]):
        check_prompt(prompt, "prompt 1")


def test_a_response_is_text() -> None:
    with pytest.raises(UserError, match=r"^response 1 is nothing; text was expected$"):
        check_text(None, "response 1")


def test_lists_have_one_item_per_prompt() -> None:
    check_lists(prompts=["a", "b"], responses=["c", "d"], columns=None)
    with pytest.raises(UserError, match=r"in each list, not 2 prompts, 1 responses$"):
        check_lists(prompts=["a", "b"], responses=["c"], columns=None)
    with pytest.raises(TypeError, match=r"^prompts is one text; a list was expected: \['abc'\]$"):
        check_lists(prompts="abc")


def test_advice_on_room_is_for_a_possible_length() -> None:
    check_room("the prompt", tokens=2000, new_tokens=48, positions=2048)
    check_room("the prompt", tokens=9999, new_tokens=48, positions=None)
    with pytest.raises(UserError, match=r"2048: shorten it, or allow at most 48 \(max_new_tokens, --max-new-tokens\)$"):
        check_room("the prompt", tokens=2000, new_tokens=49, positions=2048)
    with pytest.raises(UserError, match=r"2048: shorten it$"):
        check_room("the prompt", tokens=4550, new_tokens=1, positions=2048)


def test_a_response_that_does_not_fit_with_its_prompt_is_refused() -> None:
    check_fits("they have", tokens=2048, positions=2048)
    with pytest.raises(UserError, match=r"^they have 2049 tokens, .* context length is 2048: shorten them$"):
        check_fits("they have", tokens=2049, positions=2048)


def test_a_system_prompt_that_is_not_utf8_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["align", "generate", "no-such-run", "--system", "a\udcff"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --system is not UTF-8: it has the byte 0xff\n"


def test_a_chat_keeps_its_system_prompt_where_a_new_one_is_not_utf8() -> None:
    notes: list[str] = []
    chat = Chat(respond=lambda prompt, replies: pytest.fail("replied"), show=notes.append, tell=notes.append)
    chat.system = "short"
    chat.run(iter(["/system a\udcff\n", None]).__next__)
    assert chat.system == "short"
    assert notes == ["the system prompt is not UTF-8: it has the byte 0xff"]
