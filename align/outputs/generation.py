"""`align generate`: responses to given prompts, or a chat."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from align.config.schema import SourceSettings
from align.data.forms import read_source_rows
from align.data.parsing import PromptRow, parse_prompt, parse_rows
from align.outputs.chat import Chat, line_reader
from align.outputs.trained_run import TrainedRun
from align.runtime.wording import counted
from policies.errors import UserError
from policies.text.encoder import Tools
from policies.text.tokenization import Prompt

Tell = Callable[[str], None]
"""Writes a note that is not the model's text."""


@dataclass(frozen=True)
class Options:
    """How prompts become tokens, and how responses are drawn.

    Attributes:
        raw: Continue texts as they are, without the chat template.
        system: The system prompt; None: none.
        temperature: None: that of the run.
        max_new_tokens: None: that of the run.
        seed: Seed of the sampling.
    """

    raw: bool = False
    system: str | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None
    seed: int = 0

    def uses_template(self, trained: TrainedRun) -> bool:
        """Whether texts are messages by the user, for the chat template.

        Raises:
            UserError: There is a system prompt and no template to put it in.
        """
        template = trained.encoder.has_template and not self.raw
        if self.system and not template:
            why = "--raw does without: remove one of the two"
            if not self.raw:
                why = f"{trained.experiment.model.path} has none: put its text into the prompt"
            raise UserError(f"--system needs a chat template, and {why}")
        return template


def print_responses(trained: TrainedRun, texts: Sequence[str], file: Path | None, options: Options, tell: Tell) -> None:
    """Print a response to each text and to each row of a file, whose texts stay texts.

    Args:
        trained: The run whose policy responds.
        texts: Messages by the user if the tokenizer has a chat template, and otherwise texts to continue.
        file: Rows with `prompt`; None: none.
        options: How to generate.
        tell: Writes a note on what the chat template is used for.
    """
    template = options.uses_template(trained)
    rows = [PromptRow(_prompt(text, template, options.system), {}) for text in texts]
    if rows and template:
        tell("--prompt is a message for the chat template; --raw continues it as text")
    if file:
        from_file = parse_rows(read_source_rows(SourceSettings(path=str(file)), "prompts"), parse_prompt, "error").items
        plain = sum(isinstance(row.prompt, str) for row in from_file)
        if plain and trained.encoder.has_template:
            prompts = counted(plain, "prompt")
            tell(f"{file}: {prompts} of plain text, continued without the chat template as in training")
        rows += from_file
    responses = trained.generate(
        [row.prompt for row in rows],
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        tools=list(map(_tools, rows)),
    )
    for response in responses:
        print(response)


def chat_on_standard_input(trained: TrainedRun, options: Options, tell: Tell) -> None:
    """Chat with a run's policy: lines from standard input, replies to standard output as they are generated.

    Args:
        trained: The run.
        options: How to generate; the seed is that of the first reply, and each further one has the next.
        tell: Writes a note about the chat.
    """
    template = options.uses_template(trained)
    trained.load()
    if not template:
        why = "--raw" if options.raw else "the tokenizer has no chat template"
        tell(f"{why}: each line is continued as text, without history")
    elif sys.stdin.isatty():
        tell("a chat with the model's template; /help lists the commands, Ctrl-D ends it")
    chat = Chat(
        respond=lambda prompt, replies: trained.stream(
            prompt,
            temperature=options.temperature,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed + replies,
        ),
        show=partial(print, end="", flush=True),
        tell=tell,
        template=template,
        system=options.system,
    )
    chat.run(line_reader(tell))


def _prompt(text: str, template: bool, system: str | None) -> Prompt:
    if not template:
        return text
    messages = [{"role": "user", "content": text}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _tools(row: PromptRow) -> Tools | None:
    return row.tools
