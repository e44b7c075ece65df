"""Prompting baselines: the base model prompted in other ways, to compare a trained policy with."""

from collections.abc import Callable
from dataclasses import replace

from align.config.schema import PromptStyleSettings
from policies.text.columns import tools
from policies.text.encoder import TextEncoder
from policies.text.tokenization import Prompt
from rollouts.trajectory import Request

PromptStyle = Callable[[Request], Request]
"""Turns a request into one that asks the same in another way."""


def make_prompt_style(settings: PromptStyleSettings, encoder: TextEncoder) -> PromptStyle:
    """A function that adds the style's system prompt, examples and suffix to a request's prompt."""

    def style(request: Request) -> Request:
        prompt = styled(request.prompt, settings)
        functions = None if isinstance(prompt, str) else tools(request.columns, prompt)
        return replace(request, prompt=prompt, prompt_ids=tuple(encoder.prompt(prompt, functions)))

    return style


def styled(prompt: Prompt, settings: PromptStyleSettings) -> Prompt:
    """Add the style's system prompt, examples and suffix to a prompt.

    In text, the parts are separated by blank lines. In messages, the system prompt replaces the prompt's own, and each
    example becomes a turn of the user and a turn of the assistant.
    """
    if isinstance(prompt, str):
        parts = [settings.system] if settings.system else []
        parts += [example.prompt + example.completion for example in settings.examples]
        return "\n\n".join([*parts, prompt + settings.suffix])
    system = [message for message in prompt[:1] if message["role"] == "system"]
    *earlier, last = prompt[len(system) :]
    if settings.system:
        system = [{"role": "system", "content": settings.system}]
    examples = []
    for example in settings.examples:
        examples.append({"role": "user", "content": example.prompt})
        examples.append({"role": "assistant", "content": example.completion})
    return [*system, *examples, *earlier, last | {"content": last["content"] + settings.suffix}]
