"""Chat templates for base models whose tokenizer has none, by name or from a file, checked before they are used."""

from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from policies.errors import UserError
from policies.text.encoder import ASSISTANT, TextEncoder
from policies.text.tokenization import Message

BUILT_IN = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        "{{ message['content'] }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}Assistant:\n{% endif %}"
    ),
}
"""The templates that can be named: of Qwen and others, of Llama 3, and one of plain words that ends turns by EOS."""
CONTROL_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""The tokens of a tokenizer that a named template writes."""
USER, REPLY, SECOND_USER, SYSTEM = "q7f3a", "r9b2c", "u4d8e", "s5c1f"
"""Contents without white space, which no template changes, to see what a template makes of messages."""


def use_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give a tokenizer a chat template, in place of its own if it has one.

    Args:
        tokenizer: The tokenizer; it has an EOS token.
        name: The name of a built-in template, or a file in Jinja.

    Raises:
        UserError: There is no such template; it does not compile; it drops messages; it begins the assistant's turn
            differently when it asks for a reply; or it writes control tokens that the tokenizer lacks.
    """
    tokenizer.chat_template = _with_start(tokenizer, name) if name in BUILT_IN else read_template(name)
    _check_control_tokens(tokenizer, name)
    _check_template(tokenizer, name)


def read_template(name: str) -> str:
    """The text of a template by its name or file. Raises UserError where there is no such file."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    try:
        return Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"model.chat_template: there is no file {name}; expected a file in Jinja, or one of {', '.join(BUILT_IN)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template: {name} cannot be read: {error}") from error


def _with_start(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """A built-in template that begins with BOS where the tokenizer begins texts so."""
    begins_with_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return "{{ bos_token }}" + BUILT_IN[name] if begins_with_bos else BUILT_IN[name]


def _check_control_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise UserError where a built-in template would write a control token as plain text."""
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    missing = [token for token in CONTROL_TOKENS.get(name, ()) if token not in known]
    if missing:
        raise UserError(
            f"model.chat_template: {name} writes {' and '.join(missing)}, which the tokenizer does not have as special "
            "tokens: use plain, whose turns end with the EOS token, or for a base of model.architecture add them to "
            "model.tokenizer.special_tokens"
        )


def _check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise UserError where a template fails on a usual conversation, or loses a part of it."""
    user: Message = {"role": "user", "content": USER}
    reply: Message = {"role": ASSISTANT, "content": REPLY}
    second: Message = {"role": "user", "content": SECOND_USER}
    _refuse_dropped([user, reply, second], _render(tokenizer, name, [user, reply, second]), name)
    system: Message = {"role": "system", "content": SYSTEM}
    try:
        rendered = tokenizer.apply_chat_template([system, user], tokenize=False, add_generation_prompt=True)
    except TemplateError:
        pass  # it refuses system messages, and so will the rows that have them be
    else:
        _refuse_dropped([system, user], rendered, name)
    try:
        TextEncoder(tokenizer, "control").conversation([user, reply], "last")
    except ValueError as error:
        raise UserError(f"model.chat_template: {name}: {error}") from error


def _render(tokenizer: PreTrainedTokenizerBase, name: str, messages: list[Message]) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateSyntaxError as error:
        raise UserError(f"model.chat_template: {name}:{error.lineno}: not a template in Jinja: {error}") from error
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(
            f"model.chat_template: {name} fails on a conversation of user and assistant: {error}"
        ) from error


def _refuse_dropped(messages: list[Message], rendered: str, name: str) -> None:
    """Raise UserError where the content of a message is not in the rendered text, after those before it."""
    position = 0
    for number, message in enumerate(messages, start=1):
        position = rendered.find(message["content"], position)
        if position < 0:
            roles = ", ".join(each["role"] for each in messages)
            raise UserError(
                f"model.chat_template: {name} drops message {number} of a conversation of {roles}: a template must "
                "write the content of each message, in order, or call raise_exception for roles that it refuses"
            )
