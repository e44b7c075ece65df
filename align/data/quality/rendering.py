"""Conversations that the model's chat template does not render, or not completely."""

from align.data.quality.check import Flagged, flagged_by_reason
from align.data.quality.corpus import Corpus
from align.data.quality.rows import Content
from policies.text.encoder import ASSISTANT, TextEncoder
from policies.text.tokenization import Message

WRITTEN_AS_THEY_ARE = ("system", "developer", "user", ASSISTANT)
"""Whose texts a template writes as they are; it may write the results of functions as JSON."""


def find_template_failures(corpus: Corpus) -> Flagged | None:
    """Rows on whose messages the chat template fails, or parts of which it drops."""
    rendered = corpus.lengths  # renders each row, and notes where that fails
    reasons = {index: text for index, text in corpus.template_problems.items() if "template" in text}
    for index in rendered:
        dropped = _dropped_part(corpus.encoder, corpus.contents[index])
        if dropped:
            reasons[index] = dropped
    return flagged_by_reason(reasons, "not rendered, or not completely, by the chat template")


def _dropped_part(encoder: TextEncoder | None, content: Content) -> str | None:
    """Whose message is not in the rendered text as a whole; None where all are, and for prompts that are text."""
    messages = _messages_of(content)
    if encoder is None or not messages:
        return None
    text = _without_spaces(encoder.rendered(messages, content.tools))
    for message in messages:
        if message["role"] in WRITTEN_AS_THEY_ARE and _without_spaces(message["content"]) not in text:
            return f"the chat template drops a message by the {message['role']}, or a part of it"
    return None


def _messages_of(content: Content) -> list[Message] | None:
    """The conversation of a row, with its first response; None where the prompt is text."""
    if content.messages is not None:
        return content.messages
    if isinstance(content.prompt, str):
        return None
    replies: list[Message] = [{"role": ASSISTANT, "content": response} for response in content.responses[:1]]
    return [*content.prompt, *replies]


def _without_spaces(text: str) -> str:
    """Templates trim texts and put parts on lines of their own."""
    return "".join(text.split())
