"""`align generate` and `TrainedRun`: the chat template, the history, and streaming."""

import io
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import align as library
from align.outputs.generation import Options, chat_on_standard_input, print_responses
from align.outputs.trained_run import TrainedRun
from tests.integration.tiny_run import COMMAND, ENVIRONMENT, make_settings, run_in_process, write_rows

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def make_run(model: Path, folder: Path, **changes: Any) -> Path:
    return run_in_process(make_settings(model, folder) | {"stages": ["sft"]} | changes)


@pytest.fixture(scope="module")
def chat_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SFT on a model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    model = folder / "model"
    model.mkdir()
    for file in tiny_model.iterdir():
        (model / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    (model / "tokenizer_config.json").unlink()
    tokenizer.save_pretrained(folder / "tokenizer")
    for file in (folder / "tokenizer").iterdir():
        (model / file.name).unlink(missing_ok=True)
        file.rename(model / file.name)
    return make_run(model, folder)


@pytest.fixture(scope="module")
def plain_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tiny_model, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chatting(chat_run: Path) -> TrainedRun:
    return library.open_run(chat_run)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("prompt", ["two dogs", [user("two dogs")]], ids=["text", "messages"])
def test_a_stream_is_the_response_that_generate_gives(chatting: TrainedRun, prompt: Any, temperature: float) -> None:
    for seed in range(5):
        (expected,) = chatting.generate([prompt], temperature=temperature, max_new_tokens=40, seed=seed)
        stream = chatting.stream(prompt, temperature=temperature, max_new_tokens=40, seed=seed)
        pieces = list(stream)
        assert "".join(pieces) == expected
        assert len(pieces) > 1 or len(expected) < 5


def test_a_stream_tells_whether_the_response_was_truncated(chatting: TrainedRun) -> None:
    stream = chatting.stream("two dogs", max_new_tokens=1, temperature=0.0)
    assert list(stream)
    assert stream.truncated


def test_a_refused_prompt_is_told_before_anything_is_generated(chatting: TrainedRun) -> None:
    with pytest.raises(library.UserError, match="special token '</s>'"):
        chatting.stream([user("a </s>")])
    with pytest.raises(library.UserError, match="leaves no room for 5000 new ones in the model's context length, 2048"):
        chatting.stream("a", max_new_tokens=5000)
    with pytest.raises(library.UserError, match=r"^the prompt is not UTF-8: it has the byte 0xff$"):
        chatting.stream([user("a \udcff")])
    with pytest.raises(library.UserError, match=r"10000 tokens, which leaves no room .* 2048: shorten it$"):
        chatting.stream("word " * 2500, max_new_tokens=5)


def printed(run: TrainedRun, texts: list[str], file: Path | None, options: Options) -> tuple[list[str], str]:
    """The lines that `align generate` prints for these prompts, and its notes."""
    notes: list[str] = []
    with redirect_stdout(io.StringIO()) as output:
        print_responses(run, texts, file, options, notes.append)
    return output.getvalue().split("\n")[:-1], "\n".join(notes)


def test_a_prompt_is_a_message_where_there_is_a_template(chatting: TrainedRun) -> None:
    messages = [{"role": "system", "content": "short"}, user("two dogs")]
    expected = chatting.generate([messages, messages], seed=3)
    lines, notes = printed(chatting, ["two dogs"] * 2, None, Options(system="short", seed=3))
    assert lines == expected
    assert notes == "--prompt is a message for the chat template; --raw continues it as text"


def test_raw_prompts_are_continued_as_text(chatting: TrainedRun) -> None:
    assert printed(chatting, ["two dogs"], None, Options(raw=True)) == (chatting.generate(["two dogs"]), "")


def test_rows_of_a_file_stay_what_they_are(chatting: TrainedRun, tmp_path: Path) -> None:
    prompts = ["two dogs", [user("two dogs")]]
    file = Path(write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts]))
    expected = chatting.generate(prompts)  # type: ignore[arg-type]
    note = f"{file}: 1 prompt of plain text, continued without the chat template as in training"
    assert printed(chatting, [], file, Options()) == (expected, note)


def test_tools_of_a_row_reach_the_template(chatting: TrainedRun, tmp_path: Path) -> None:
    row = {"prompt": [user("two dogs")], "tools": [{"type": "function", "function": {"name": "f"}}]}
    file = Path(write_rows(tmp_path / "prompts.jsonl", [row]))
    with pytest.raises(library.UserError, match="has `tools`, which the tokenizer's chat template does not use"):
        printed(chatting, [], file, Options())


def chat(run: TrainedRun, lines: str, options: Options, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """What a chat prints for these lines of standard input, and its notes."""
    notes: list[str] = []
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    with redirect_stdout(io.StringIO()) as output:
        chat_on_standard_input(run, options, notes.append)
    return output.getvalue(), "\n".join(notes)


@pytest.mark.slow
def test_a_chat_on_a_pipe_has_history(chat_run: Path, chatting: TrainedRun) -> None:
    first = [user("two dogs")]
    (reply,) = chatting.generate([first], temperature=0.0)
    second = [*first, {"role": "assistant", "content": reply}, user("and a cat")]
    (next_reply,) = chatting.generate([second], temperature=0.0)
    ended = subprocess.run(
        [*COMMAND, "generate", str(chat_run), "--temperature", "0"],
        input="two dogs\na </s>\nand a cat\n/reset\ntwo dogs\n/quit\nnever\n",
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"{reply}\n{next_reply}\n{reply}\n"
    assert "special token '</s>'" in ended.stderr


def test_each_reply_of_a_chat_has_the_next_seed(chatting: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [chatting.generate([[user("two dogs")]], seed=seed)[0] for seed in (7, 8)]
    output, _ = chat(chatting, "two dogs\n/reset\ntwo dogs\n", Options(seed=7), monkeypatch)
    assert output == "".join(f"{reply}\n" for reply in expected)


def test_a_conversation_that_no_longer_fits_is_told_with_a_way_out(
    chatting: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, notes = chat(chatting, f"{'word ' * 250}\n" * 3 + "/reset\nhi\n", Options(), monkeypatch)
    assert output.count("\n") >= 2
    assert "leaves no room for 6 new ones in the model's context length, 2048" in notes
    assert "/reset empties the conversation\n" in notes
    assert "the conversation is empty" in notes


def test_a_chat_without_a_template_says_that_it_continues_text(
    plain_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = library.open_run(plain_run)
    output, notes = chat(trained, "two dogs \n", Options(), monkeypatch)
    assert output == f"{trained.generate(['two dogs '])[0]}\n"
    assert notes.startswith("the tokenizer has no chat template: each line is continued as text, without history")


def test_a_system_prompt_needs_a_template(plain_run: Path, chatting: TrainedRun) -> None:
    with pytest.raises(library.UserError, match="--raw does without"):
        Options(raw=True, system="b").uses_template(chatting)
    with pytest.raises(library.UserError, match=r"--system needs a chat template, and .* has none"):
        Options(system="b").uses_template(library.open_run(plain_run))


class Terminal:
    """Our end of a pseudo-terminal."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.unread = ""

    def appears(self, text: str, seconds: float) -> bool:
        """Read up to the next place where a text appears, for some seconds. Returns whether it did."""
        end = time.monotonic() + seconds
        while text not in self.unread:
            ready, _, _ = select.select([self.descriptor], [], [], max(end - time.monotonic(), 0))
            if not ready:
                return False
            self.unread += os.read(self.descriptor, 4096).decode(errors="replace")
        self.unread = self.unread.partition(text)[2]
        return True

    def read_until(self, text: str) -> None:
        """Read up to the next place where a text appears."""
        assert self.appears(text, seconds=60), self.unread

    def interrupt_until(self, text: str, process: subprocess.Popen[bytes]) -> None:
        """Interrupt a process until a text appears.

        Python's `input` notices a signal that comes just before it begins to wait for a key with that key alone.
        """
        for _ in range(5):
            process.send_signal(signal.SIGINT)
            if self.appears(text, seconds=10):
                return
        raise AssertionError(self.unread)


@contextmanager
def started(command: list[str], terminal: int) -> Iterator[subprocess.Popen[bytes]]:
    """A command on a terminal, which is killed at the end if it is still there."""
    with subprocess.Popen(
        command,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=ENVIRONMENT | {"TERM": "dumb"},
        start_new_session=True,
    ) as process:
        os.close(terminal)
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_on_a_terminal_control_c_stops_a_reply_and_control_d_ends_the_chat(chat_run: Path) -> None:
    ours, theirs = pty.openpty()
    terminal = Terminal(ours)
    command = [*COMMAND, "generate", str(chat_run), "--max-new-tokens", "1900", "--temperature", "0"]
    with started(command, theirs) as process:
        terminal.read_until("> ")
        os.write(ours, b"a\n")  # to which the greedy reply does not end
        terminal.read_until("\n")  # the terminal's echo; then the reply
        select.select([ours], [], [], 60)
        process.send_signal(signal.SIGINT)
        terminal.read_until("(stopped)")
        terminal.read_until("> ")
        terminal.interrupt_until("/quit or Ctrl-D ends the chat", process)
        terminal.read_until("> ")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    os.close(ours)
