"""Chat templates that an experiment names: what they write, and which are refused."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from policies.errors import UserError
from policies.text.chat_templates import BUILT_IN, CONTROL_TOKENS, use_template
from policies.text.encoder import TextEncoder
from policies.text.tokenization import Message
from tests.policies.text.layouts import LAYOUTS, make_tokenizer

TALK: list[Message] = [
    {"role": "system", "content": "You are a terse helper."},
    {"role": "user", "content": "My lamp is broken."},
    {"role": "assistant", "content": "Is the bulb old?"},
    {"role": "user", "content": "No, it is new."},
    {"role": "assistant", "content": "Then check the fuse."},
]
WRITTEN = {
    "plain": "System:\nYou are a terse helper.\n\nUser:\nMy lamp is broken.\n\nAssistant:\nIs the bulb old?EOS\n\n"
    "User:\nNo, it is new.\n\nAssistant:\nThen check the fuse.EOS\n\n",
    "chatml": "<|im_start|>system\nYou are a terse helper.<|im_end|>\n<|im_start|>user\nMy lamp is broken.<|im_end|>\n"
    "<|im_start|>assistant\nIs the bulb old?<|im_end|>\n<|im_start|>user\nNo, it is new.<|im_end|>\n"
    "<|im_start|>assistant\nThen check the fuse.<|im_end|>\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nYou are a terse helper.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nMy lamp is broken.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nIs the bulb old?<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nNo, it is new.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nThen check the fuse.<|eot_id|>",
}


def without_template(layout: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(LAYOUTS[layout])
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_named_template_writes_turns_that_can_all_be_trained(name: str, layout: str) -> None:
    tokenizer = without_template(layout)
    if not set(CONTROL_TOKENS.get(name, ())) <= set(tokenizer.get_vocab()):
        with pytest.raises(UserError, match="which the tokenizer does not have as special tokens: use plain"):
            use_template(tokenizer, name)
        return
    use_template(tokenizer, name)
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False)
    bos = LAYOUTS[layout].bos or ""
    assert rendered == bos + WRITTEN[name].replace("EOS", tokenizer.eos_token)
    encoder = TextEncoder(tokenizer)
    conversation = encoder.conversation(TALK, "all")
    turns = [tokenizer.decode(conversation.ids[start:end]) for start, end in conversation.turns]
    assert [turn.strip() for turn in turns] == [f"{TALK[i]['content']}{encoder.end_of_turn}" for i in (2, 4)]
    for (start, _), index in zip(conversation.turns, (2, 4), strict=True):
        assert encoder.prompt(TALK[:index]) == conversation.ids[:start]


def test_a_template_from_a_file_takes_the_place_of_the_tokenizers_own(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(BUILT_IN["plain"])
    tokenizer = make_tokenizer(LAYOUTS["qwen 2.5"])
    use_template(tokenizer, str(file))
    assert tokenizer.apply_chat_template(TALK[1:2], tokenize=False) == "User:\nMy lamp is broken.\n\n"


GENERATION = "{% if add_generation_prompt %}A:{% endif %}"
REFUSED = {
    "does not compile": (
        "{% for m in messages %}\n{{ m.content }\n{% endfor %}",
        r"template\.jinja:2: not a template in Jinja",
    ),
    "fails": ("{{ messages[0].name.first }}", r"fails on a conversation of user and assistant"),
    "drops the user": (
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        + GENERATION,
        r"drops message 1 of a conversation of user, assistant, user",
    ),
    "drops earlier turns": (
        "{{ messages[-1].role }}:{{ messages[-1].content }}" + GENERATION,
        r"drops message 1 of a conversation of user, assistant, user",
    ),
    "drops the system message": (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.role[0] | upper }}:{{ m.content }}\n{% endif %}"
        "{% endfor %}" + GENERATION,
        r"drops message 1 of a conversation of system, user",
    ),
    "writes messages in another order": (
        "{% for m in messages | reverse %}{{ m.role[0] | upper }}:{{ m.content }}\n{% endfor %}" + GENERATION,
        r"drops message 2 of a conversation",
    ),
    "asks for replies in another way": (
        "{% for m in messages %}{{ m.role[0] | upper }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}Reply:{% endif %}",
        r"begins the assistant's turn differently when it asks for a reply",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_would_do_harm_is_refused(case: str, tmp_path: Path) -> None:
    text, message = REFUSED[case]
    file = tmp_path / "template.jinja"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"^model\.chat_template: .*{message}"):
        use_template(without_template("gpt 2"), str(file))


def test_a_template_may_refuse_system_messages(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    file.write_text(refusal + BUILT_IN["plain"])
    tokenizer = without_template("gpt 2")
    use_template(tokenizer, str(file))
    with pytest.raises(ValueError, match="no system"):
        TextEncoder(tokenizer).prompt(TALK[:2])


def test_a_template_that_does_not_exist_is_refused_with_the_names_that_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file chatlm; expected a file in Jinja, or one of chatml, llama3"):
        use_template(without_template("gpt 2"), "chatlm")
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.jinja cannot be read"):
        use_template(without_template("gpt 2"), str(tmp_path / "binary.jinja"))
