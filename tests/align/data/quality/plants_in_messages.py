"""Faults of conversations: the order of their turns, and what a chat template makes of them."""

from typing import Any

from tests.align.data.quality.clean_files import Row, message
from tests.align.data.quality.plant import Files, Locations, Plant

ALTERNATING = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
"""As Mistral's and Gemma's: no system message, and the turns alternate."""
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS_ALONE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '### User: ' + m['content'] + '\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ '### Assistant: ' + m['content'] + eos_token + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:' }}{% endif %}"
)
"""Says nothing of system messages: they are left out without a word."""
LAST_THOUGHTS = (
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen 3's: the thoughts of earlier turns are left out."""
TEMPLATES = {
    "alternating": ALTERNATING,
    "chatml": CHATML,
    "turns alone": TURNS_ALONE,
    "last thoughts": LAST_THOUGHTS,
    "none": None,
}


def system_message_is_refused(files: Files) -> Locations:
    return [i for i, row in enumerate(files.rows) if row["messages"][0]["role"] == "system"]


def system_message_is_left_out(files: Files) -> Locations:
    return system_message_is_refused(files)


def thoughts_of_an_earlier_turn_are_left_out(files: Files) -> Locations:
    chosen = files.some(3, lambda row: len(row["messages"]) > 3)
    for index in chosen:
        first = next(turn for turn in files.rows[index]["messages"] if turn["role"] == "assistant")
        first["content"] = f"<think>\nThe user wants to know it by tonight.\n</think>\n\n{first['content']}"
    return chosen


def tokenizer_without_a_template(files: Files) -> Locations:
    return range(len(files.rows))


def refused_prompt_of_a_pair(files: Files) -> Locations:
    return [i for i, row in enumerate(files.rows) if row["chosen"][0]["role"] == "system"]


def turns(row: Row) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = row["messages"]
    return listed


def two_turns_of_the_user_in_a_row(files: Files) -> Locations:
    chosen = files.some(3, lambda row: turns(row)[0]["role"] == "user")
    for index in chosen:
        turns(files.rows[index]).insert(0, message("user", "Hello, are you there? I have been waiting for hours."))
    return chosen


def reply_is_missing_in_the_middle(files: Files) -> Locations:
    chosen = files.some(3, lambda row: len(turns(row)) > 4)
    for index in chosen:
        replies = [i for i, turn in enumerate(turns(files.rows[index])) if turn["role"] == "assistant"]
        del turns(files.rows[index])[replies[0]]
    return chosen


def system_message_comes_late(files: Files) -> Locations:
    chosen = files.some(2, lambda row: turns(row)[0]["role"] == "system" and len(turns(row)) > 3)
    for index in chosen:
        listed = turns(files.rows[index])
        listed.insert(2, listed.pop(0))
    return chosen


def begins_or_ends_with_the_wrong_speaker(files: Files) -> Locations:
    chosen = files.some(4, lambda row: turns(row)[0]["role"] == "user")
    for index in chosen[:2]:
        turns(files.rows[index]).insert(0, message("assistant", "How may I help you today?"))
    for index in chosen[2:]:
        turns(files.rows[index]).append(message("user", "Thank you, that is all."))
    return chosen


def missing_and_unknown_roles(files: Files) -> Locations:
    chosen = files.some(4)
    for index, role in zip(chosen, ("bot", "Assistant", "", None)):
        turns(files.rows[index])[-1]["role"] = role
    return chosen


def two_humans_in_a_transcript(files: Files) -> Locations:
    chosen = files.some(2, lambda row: row["chosen"].count("\n\nHuman:") == 2)
    for index in chosen:
        for column in ("chosen", "rejected"):
            text = files.rows[index][column]
            files.rows[index][column] = text.replace("\n\nAssistant:", "\n\nHuman:", 1)
    return chosen


def prompt_ends_with_the_assistant(files: Files) -> Locations:
    chosen = files.some(3)
    for index in chosen:
        files.rows[index]["prompt"].append(message("assistant", "I will look it up for you right away."))
    return chosen


PLANTS: list[Plant] = [
    Plant("chat-template-failures", system_message_is_refused, "messages", template="alternating"),
    Plant("chat-template-failures", system_message_is_left_out, "messages", template="turns alone"),
    Plant("chat-template-failures", thoughts_of_an_earlier_turn_are_left_out, "messages", template="last thoughts"),
    Plant("chat-template-failures", tokenizer_without_a_template, "messages", template="none"),
    Plant("chat-template-failures", refused_prompt_of_a_pair, "message_pair", template="alternating"),
    Plant("turn-order", two_turns_of_the_user_in_a_row, "messages"),
    Plant("turn-order", reply_is_missing_in_the_middle, "messages"),
    Plant("turn-order", system_message_comes_late, "messages"),
    Plant("turn-order", begins_or_ends_with_the_wrong_speaker, "messages"),
    Plant("turn-order", missing_and_unknown_roles, "messages"),
    Plant("turn-order", two_humans_in_a_transcript, "transcripts"),
    Plant("turn-order", prompt_ends_with_the_assistant, "prompt_messages"),
]
