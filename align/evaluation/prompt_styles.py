"""Ways to put a prompt to the model before any training: what a trained policy is to be set against."""

from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from align.config.schema import PromptStyleSettings
from policies.text.tokenization import Prompt, encode_prompt
from rollouts.trajectory import Request

PromptStyle = Callable[[Request], Request]
"""The same question, put in another way."""


def make_prompt_style(settings: PromptStyleSettings, tokenizer: PreTrainedTokenizerBase) -> PromptStyle:
    """A request with the style's system prompt, examples and suffix about its prompt."""

    def style(request: Request) -> Request:
        prompt = styled(request.prompt, settings)
        return replace(request, prompt=prompt, prompt_ids=tuple(encode_prompt(tokenizer, prompt)))

    return style


def styled(prompt: Prompt, settings: PromptStyleSettings) -> Prompt:
    """In messages, the system prompt comes first and examples are turns; before text, all stand a blank line apart."""
    if isinstance(prompt, str):
        before = [settings.system] if settings.system else []
        before += [example.prompt + example.completion for example in settings.examples]
        return "\n\n".join([*before, prompt + settings.suffix])
    own = [message for message in prompt[:1] if message["role"] == "system"]
    system = [{"role": "system", "content": settings.system}] if settings.system else own
    rest = prompt[len(own) :]
    turns = [
        {"role": role, "content": content}
        for example in settings.examples
        for role, content in (("user", example.prompt), ("assistant", example.completion))
    ]
    *earlier, last = rest
    return [*system, *turns, *earlier, last | {"content": last["content"] + settings.suffix}]
