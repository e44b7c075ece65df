"""A chat keeps the conversation, obeys its commands, and outlives what goes wrong in a turn."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from align.outputs.chat import Chat, line_reader
from policies.errors import UserError
from policies.text.tokenization import Prompt


class Scripted:
    """A reply with these pieces; an exception among them is raised in its place."""

    def __init__(self, *pieces: str | BaseException, truncated: bool = False) -> None:
        self.pieces = pieces
        self.truncated = truncated

    def __iter__(self) -> Iterator[str]:
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


class Recorded:
    """A chat with what it was asked, showed and told."""

    def __init__(self, respond: Callable[[Prompt], Scripted], **options: Any) -> None:
        self.prompts: list[tuple[Prompt, int]] = []
        self.shown: list[str] = []
        self.told: list[str] = []

        def recorded(prompt: Prompt, replies: int) -> Scripted:
            self.prompts.append((prompt, replies))
            return respond(prompt)

        self.chat = Chat(recorded, self.shown.append, self.told.append, **options)

    def run(self, *lines: str) -> "Recorded":
        left = iter(lines)
        self.chat.run(lambda: next(left, None))
        return self


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be kind"}


def greet(prompt: Prompt) -> Scripted:
    return Scripted("Hel", "lo", f" {len(prompt)}")


def test_the_next_prompt_holds_the_conversation_with_the_replies() -> None:
    asked = Recorded(greet, system="be kind").run("hi\n", "\n", "and?\n").prompts
    assert asked == [
        ([SYSTEM, user("hi")], 0),
        ([SYSTEM, user("hi"), assistant("Hello 2"), user("and?")], 1),
    ]


def test_pieces_are_shown_as_they_come_and_each_reply_ends_its_line() -> None:
    assert Recorded(greet).run("hi").shown == ["Hel", "lo", " 1", "\n"]


def test_reset_empties_the_conversation_and_keeps_the_system_prompt() -> None:
    asked = Recorded(greet, system="be kind").run("hi", "/reset", "again").prompts
    assert asked[-1] == ([SYSTEM, user("again")], 1)


def test_the_system_prompt_is_set_and_removed() -> None:
    recorded = Recorded(greet).run("/system be kind", "hi", "/reset", "/system", "hi")
    assert [prompt for prompt, _ in recorded.prompts] == [[SYSTEM, user("hi")], [user("hi")]]
    assert recorded.told == [
        "the system prompt is set",
        "the conversation is empty",
        "the system prompt is removed",
    ]


def test_quit_ends_the_chat() -> None:
    assert Recorded(greet).run("/quit", "hi").prompts == []


def test_help_lists_the_commands() -> None:
    (text,) = Recorded(greet).run("/help").told
    assert all(command in text for command in ("/reset", "/system", "/quit", "/help"))


def test_an_unknown_command_is_told_and_not_sent() -> None:
    recorded = Recorded(greet).run("/exit now", " /etc/hosts is what?")
    assert recorded.told == ["/exit is not a command; /help lists them. Begin the line with a space to send it"]
    assert recorded.prompts == [([user("/etc/hosts is what?")], 0)]


def test_a_refused_message_is_told_and_leaves_the_conversation_as_it_was() -> None:
    def respond(prompt: Prompt) -> Scripted:
        if "</s>" in prompt[-1]["content"]:  # type: ignore[index]
            raise UserError("the text contains the special token '</s>'")
        return Scripted("ok")

    recorded = Recorded(respond).run("a </s>", "hi", "b </s>", "bye")
    assert [prompt for prompt, _ in recorded.prompts][-1] == [user("hi"), assistant("ok"), user("bye")]
    assert recorded.told == [
        "the text contains the special token '</s>'",
        "the text contains the special token '</s>'; /reset empties the conversation",
    ]


def test_an_interrupt_stops_the_reply_and_keeps_what_was_shown() -> None:
    replies = iter([Scripted("Once ", KeyboardInterrupt(), "more"), Scripted("yes")])
    recorded = Recorded(lambda _: next(replies)).run("a story", "go on")
    assert recorded.prompts[-1] == ([user("a story"), assistant("Once "), user("go on")], 1)
    assert recorded.told == ["(stopped)"]
    assert recorded.shown == ["Once ", "\n", "yes", "\n"]


def test_a_reply_without_text_is_told_and_not_kept() -> None:
    replies = iter([Scripted(), Scripted("yes")])
    recorded = Recorded(lambda _: next(replies)).run("hi", "you?")
    assert recorded.prompts[-1][0] == [user("you?")]
    assert recorded.told == ["(no reply; the message is not kept)"]


def test_a_truncated_reply_is_told() -> None:
    told = Recorded(lambda _: Scripted("and so", truncated=True)).run("hi").told
    assert told == ["(truncated; --max-new-tokens sets another limit)"]


def test_without_a_template_each_line_is_text_to_continue() -> None:
    recorded = Recorded(greet, template=False).run("User: hi Assistant:\n", "/system x", "  next ")
    assert recorded.prompts == [("User: hi Assistant:", 0), ("  next ", 1)]
    assert recorded.told == ["a system prompt needs a chat template: here, each line is continued as text"]


def test_lines_come_from_a_pipe_until_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO("hi 🙂\n\n".encode() + b"wrong \xff"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    read = line_reader(print)
    assert [read(), read(), read(), read()] == ["hi 🙂\n", "\n", "wrong \udcff", None]
