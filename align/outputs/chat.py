"""A chat with a model, line by line: the conversation so far, and the commands that change it."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from typing import Protocol

from align.outputs.prompt_checks import check_text
from policies.errors import UserError
from policies.text.tokenization import Message, Prompt

HELP = """\
/reset        empty the conversation
/system TEXT  set the system prompt; without TEXT, remove it
/quit         end the chat, as Ctrl-D does
/help         show this
Ctrl-C stops a reply. A line that begins with a space is a message even if / follows."""


class StreamedReply(Protocol):
    """A reply that is being generated.

    Attributes:
        truncated: Whether it reached the limit on its tokens; known after the last piece.
    """

    truncated: bool

    def __iter__(self) -> Iterator[str]:
        """The pieces of its text."""
        ...


class Chat:
    """A conversation with a model whose tokenizer has a chat template, or lines of text for it to continue.

    Attributes:
        turns: The messages so far, without the system prompt.
        system: The system prompt; None: none.
    """

    def __init__(
        self,
        respond: Callable[[Prompt, int], StreamedReply],
        show: Callable[[str], None],
        tell: Callable[[str], None],
        template: bool = True,
        system: str | None = None,
    ) -> None:
        """Begin a chat.

        Args:
            respond: Starts the reply to a prompt; its second argument is the number of replies before. It raises
                UserError where it refuses the prompt.
            show: Writes a piece of the model's text.
            tell: Writes a line about the chat itself.
            template: Whether lines are the user's messages; otherwise each is a text to continue, without history.
            system: The system prompt.
        """
        self.respond = respond
        self.show = show
        self.tell = tell
        self.template = template
        self.system = system
        self.turns: list[Message] = []
        self._replies = 0

    def run(self, read: Callable[[], str | None]) -> None:
        """Reply to lines until there are no more of them, or /quit.

        Args:
            read: Gives the next line; None at the end.
        """
        while (line := read()) is not None:
            text = line.rstrip("\r\n")
            if text.startswith("/"):
                if not self._obey(*text.strip().partition(" ")[::2]):
                    return
            elif text.strip():
                self._reply(text)

    def _obey(self, command: str, argument: str) -> bool:
        """Obey a command. Returns whether the chat goes on."""
        if command == "/quit":
            return False
        if command == "/reset":
            self.turns.clear()
            self.tell("the conversation is empty")
        elif command == "/system":
            self._set_system(argument.strip())
        elif command == "/help":
            self.tell(HELP)
        else:
            self.tell(f"{command} is not a command; /help lists them. Begin the line with a space to send it")
        return True

    def _set_system(self, text: str) -> None:
        if not self.template:
            self.tell("a system prompt needs a chat template: here, each line is continued as text")
            return
        try:
            check_text(text, "the system prompt")
        except UserError as error:
            self.tell(str(error))
            return
        self.system = text or None
        change = "set" if text else "removed"
        kept = "; the conversation so far is kept, /reset empties it" if self.turns else ""
        self.tell(f"the system prompt is {change}{kept}")

    def _reply(self, text: str) -> None:
        """Show the reply to a line, and keep both in the conversation."""
        message = {"role": "user", "content": text.strip()}
        prompt = self._conversation(message) if self.template else text
        pieces: list[str] = []
        try:
            reply = self.respond(prompt, self._replies)
            for piece in reply:
                pieces.append(piece)
                self.show(piece)
        except UserError as error:
            self.tell(f"{error}{self._ways_out()}")
            return
        except KeyboardInterrupt:
            note = "stopped"
        else:
            note = "truncated; --max-new-tokens sets another limit" if reply.truncated else ""
        self.show("\n")
        self._replies += 1
        self._keep(message, "".join(pieces))
        if note:
            self.tell(f"({note})")

    def _conversation(self, message: Message) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns, message]

    def _keep(self, message: Message, response: str) -> None:
        """Add a message and its reply to the conversation, unless nothing was replied."""
        if not self.template:
            return
        if response:
            self.turns += [message, {"role": "assistant", "content": response}]
        else:
            self.tell("(no reply; the message is not kept)")

    def _ways_out(self) -> str:
        """What may help where a prompt was refused because of what came before it."""
        ways = []
        if self.turns:
            ways.append("/reset empties the conversation")
        if self.system:
            ways.append("/system removes the system prompt")
        return f"; {', '.join(ways)}" if ways else ""


def line_reader(tell: Callable[[str], None]) -> Callable[[], str | None]:
    """A function that reads the next line of standard input, with a prompt and editing on a terminal; None at its end.

    Args:
        tell: Writes a line about the chat itself.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that a wrong byte spoils its line alone
    if not sys.stdin.isatty():
        return lambda: sys.stdin.readline() or None
    with contextlib.suppress(ImportError):  # not in every Python; on import, `input` can edit lines
        import readline  # noqa: F401

    def read() -> str | None:
        try:
            return input("> ")
        except EOFError:
            return None
        except KeyboardInterrupt:
            tell("\n/quit or Ctrl-D ends the chat")
            return ""

    return read
