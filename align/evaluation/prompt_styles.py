"""Prompting baselines: the base model prompted in other ways, to compare a trained policy with."""

from collections.abc import Sequence
from dataclasses import replace

from align.config.schema import PromptStyleSettings
from align.evaluation.retrieval import build_index
from policies.text.alignment import TextAlignment
from policies.text.columns import tools
from policies.text.encoder import TextEncoder
from policies.text.tokenization import Prompt
from rollouts.trajectory import Request, Trajectory


class PromptStyle:
    """Asks for a response in another way, and finds the answer in the response."""

    def __init__(self, settings: PromptStyleSettings, encoder: TextEncoder) -> None:
        """Read the documents of the style, if it has any.

        Raises:
            UserError: They cannot be read.
        """
        self.settings = settings
        self.encoder = encoder
        self._index = build_index(settings.retrieval) if settings.retrieval else None

    def ask(self, request: Request) -> Request:
        """The request, with the style's system prompt, examples, passages and suffix around its prompt."""
        prompt = styled(request.prompt, self.settings, self._passages(request.prompt))
        functions = None if isinstance(prompt, str) else tools(request.columns, prompt)
        return replace(request, prompt=prompt, prompt_ids=tuple(self.encoder.prompt(prompt, functions)))

    def answer(self, trajectory: Trajectory) -> Trajectory:
        """The response from the token on that follows `answer_after`; all of it where the text or an answer is missing.

        Only the last occurrence counts.
        """
        mark = self.settings.answer_after
        if mark is None:
            return trajectory
        alignment = TextAlignment(self.encoder.tokenizer, trajectory.response_ids)
        start = alignment.text.rfind(mark)
        if start < 0:
            return trajectory
        first = alignment.completing_token(start + len(mark)) + 1
        if first == trajectory.length:
            return trajectory
        return replace(
            trajectory,
            response_ids=trajectory.response_ids[first:],
            sampler_logprobs=trajectory.sampler_logprobs[first:].clone(),
            versions=trajectory.versions[first:],
        )

    def _passages(self, prompt: Prompt) -> list[str]:
        """The passages that fit a prompt best; of messages, the last one."""
        if self._index is None or self.settings.retrieval is None:
            return []
        query = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        return self._index.best(query, self.settings.retrieval.passages)


def styled(prompt: Prompt, settings: PromptStyleSettings, passages: Sequence[str] = ()) -> Prompt:
    """Add the style's system prompt, examples and suffix to a prompt, and passages of documents.

    In text, the parts are separated by blank lines, and the passages come right before the prompt. In messages, the
    system prompt replaces the prompt's own, each example becomes a turn of the user and a turn of the assistant, and
    the passages stand in the last message.
    """
    if isinstance(prompt, str):
        parts = [settings.system] if settings.system else []
        parts += [example.prompt + example.completion for example in settings.examples]
        return "\n\n".join([*parts, *passages, prompt + settings.suffix])
    system = [message for message in prompt[:1] if message["role"] == "system"]
    *earlier, last = prompt[len(system) :]
    if settings.system:
        system = [{"role": "system", "content": settings.system}]
    examples = []
    for example in settings.examples:
        examples.append({"role": "user", "content": example.prompt})
        examples.append({"role": "assistant", "content": example.completion})
    question = "\n\n".join([*passages, last["content"] + settings.suffix])
    return [*system, *examples, *earlier, last | {"content": question}]
