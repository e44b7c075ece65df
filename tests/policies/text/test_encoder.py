"""Texts and conversations as tokens, on tokenizers and templates of the families that people adapt."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from policies.schema import SpecialTokens
from policies.text.encoder import TextEncoder, Turns
from policies.text.tokenization import Message, decode_response
from tests.policies.text.layouts import CHATML, LAYOUTS, QWEN_3, make_tokenizer

MESSAGES = [{"role": "user", "content": "name a colour."}]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
REPLIES = ("Is the bulb old?", "Then check\nthe fuse \N{ELECTRIC PLUG}", "Good bye.")
QUESTIONS = ("My lamp is broken.", "No, it is new.", "Thanks!")
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]


def conversation(*replies: str) -> list[Message]:
    messages: list[Message] = []
    for question, reply in zip(QUESTIONS, replies, strict=False):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": reply})
    return messages


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def encoder(layout: str) -> TextEncoder:
    return TextEncoder(make_tokenizer(LAYOUTS[layout]))


def written(layout: str, reply: str) -> str:
    """The turn as the template of a layout writes it."""
    before = {"llama 2": " ", "mistral": " ", "qwen 3": "<think>\n\n</think>\n\n"}.get(layout, "")
    after = " " if layout == "llama 2" else ""
    return before + reply + after + LAYOUTS[layout].end


def decoded(encoder: TextEncoder, ids: list[int], layout: str) -> str:
    """The text of tokens that continue others: a decoder drops the blank at the beginning of a text."""
    text = encoder.tokenizer.decode(ids)
    has_blank = encoder.tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁")
    return " " + text if has_blank and LAYOUTS[layout].blank != "never" else text


def test_the_trained_tokens_are_the_turns_of_the_assistant_with_their_ends(layout: str, encoder: TextEncoder) -> None:
    if layout == "qwen 3":
        with pytest.raises(ValueError, match=r"renders message 2, by the assistant, differently.*sft\.turns to last"):
            encoder.conversation(conversation(*REPLIES), "all")
        return
    trained = encoder.conversation(conversation(*REPLIES), "all")
    assert len(trained.turns) == 3
    for reply, (start, end) in zip(REPLIES, trained.turns, strict=True):
        assert decoded(encoder, trained.ids[start:end], layout) == written(layout, reply)
        assert trained.ids[end - 1] == encoder.tokenizer.convert_tokens_to_ids(LAYOUTS[layout].end)
        assert not encoder.end_ids.intersection(trained.ids[start : end - 1])


def test_only_the_last_turn_is_trained_where_that_is_asked_for(layout: str, encoder: TextEncoder) -> None:
    trained = encoder.conversation(conversation(*REPLIES), "last")
    ((start, end),) = trained.turns
    assert decoded(encoder, trained.ids[start:end], layout) == written(layout, REPLIES[-1])
    assert end == len(trained.ids)


def test_a_response_is_sampled_from_the_tokens_that_it_was_trained_after(layout: str, encoder: TextEncoder) -> None:
    messages = conversation(*REPLIES)
    turns: Turns = "last" if layout == "qwen 3" else "all"
    trained = encoder.conversation(messages, turns)
    asked = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for index, (start, _) in zip(asked[-len(trained.turns) :], trained.turns, strict=True):
        assert trained.ids[:start] == encoder.prompt(messages[:index])


def test_what_is_scored_is_what_was_trained(layout: str, encoder: TextEncoder) -> None:
    messages = conversation(*REPLIES)
    trained = encoder.conversation(messages, "last")
    exchange = encoder.exchange(messages[:-1], REPLIES[-1])
    assert exchange.prompt_ids + exchange.response_ids == trained.ids
    assert len(exchange.prompt_ids) == trained.turns[0][0]


def test_the_tokens_are_those_of_transformers(layout: str, encoder: TextEncoder) -> None:
    messages = conversation(*REPLIES)
    whole = encoder.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    ids = encoder.conversation(messages, "last").ids
    if layout == "gpt 2":  # its generation prompt ends in a blank, which a word would swallow
        assert encoder.tokenizer.decode(ids) == encoder.tokenizer.decode(whole[: len(whole) - 1])
        return
    assert ids == whole[: len(ids)]
    prompt = encoder.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
    assert encoder.prompt(messages[:-1]) == prompt["input_ids"]


@pytest.mark.parametrize("special_tokens", ["text", "control"])
def test_the_tokens_of_a_text_do_not_depend_on_what_the_tokenizer_was_used_for(
    tiny_tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokens
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    text = "a short answer</s> is good\N{ELECTRIC PLUG}"
    splits = special_tokens == "text"
    expected = tokenizer(text, add_special_tokens=False, split_special_tokens=splits)["input_ids"]
    encoder = TextEncoder(tokenizer, special_tokens)
    assert encoder.prompt(text) == expected
    tokenizer(["a", "b c d e"], padding=True, truncation=True, max_length=3, split_special_tokens=not splits)
    assert encoder.prompt(text) == expected
    tokenizer(text, split_special_tokens=not splits)
    assert encoder.prompt(text) == expected


def test_the_tokens_of_a_prompt_are_the_same_each_time(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("policies.text.encoder.MAX_PROMPTS", 2)
    encoder = TextEncoder(tiny_tokenizer)
    for text in ("a", "b", "a", "", "c", "", "a"):
        ids = encoder.prompt(text)
        assert ids == TextEncoder(tiny_tokenizer).prompt(text)
        ids.append(0)  # what a caller does to its list does not reach the next caller
    for _ in range(2):
        with pytest.raises(ValueError, match="special token"):
            encoder.prompt("a</s>")


def test_generation_ends_at_eos_and_at_the_end_of_a_turn(layout: str, encoder: TextEncoder) -> None:
    names = {LAYOUTS[layout].eos, LAYOUTS[layout].end}
    assert encoder.end_ids == set(encoder.tokenizer.convert_tokens_to_ids(sorted(names)))


@pytest.mark.parametrize(
    ("prompt", "response"), [("The lamp", " is new."), ("lamp:", "new"), ("a\n", "b"), ("", "Is it?")]
)
def test_a_response_to_a_text_continues_it_in_place(
    layout: str, encoder: TextEncoder, prompt: str, response: str
) -> None:
    exchange = encoder.exchange(prompt, response)
    assert exchange.prompt_ids == encoder.prompt(prompt)
    assert exchange.response_ids[-1] == encoder.tokenizer.eos_token_id
    ids = [*exchange.prompt_ids, *exchange.response_ids[:-1]]
    assert encoder.tokenizer.decode(ids, skip_special_tokens=True) == prompt + response
    assert exchange.prompt_ids[:1] == [encoder.tokenizer.bos_token_id] or LAYOUTS[layout].bos is None


@pytest.mark.parametrize("text", ["{}", "a {} b"])
def test_a_special_token_in_a_text_is_refused_unless_it_is_allowed(
    layout: str, encoder: TextEncoder, text: str
) -> None:
    end = LAYOUTS[layout].end
    text = text.format(end)
    with pytest.raises(ValueError, match=r"contains the special token .*data\.special_tokens"):
        encoder.prompt(text)
    with pytest.raises(ValueError, match="contains the special token"):
        encoder.exchange("a", text)
    with pytest.raises(ValueError, match="a message contains the special token"):
        encoder.prompt([{"role": "user", "content": text}])
    tokenizer = encoder.tokenizer
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert end_id in TextEncoder(tokenizer, "control").prompt(text)
    plain = TextEncoder(tokenizer, "text")
    assert end_id not in plain.prompt(text)
    assert tokenizer.decode(plain.prompt(text), skip_special_tokens=True) == text
    assert plain.exchange("a", text).response_ids.count(end_id) == (end == LAYOUTS[layout].eos)
    with pytest.raises(ValueError, match="a message contains the special token"):
        plain.prompt([{"role": "user", "content": text}])


def test_a_prompt_that_a_template_has_rendered_before_has_the_same_tokens(layout: str, encoder: TextEncoder) -> None:
    rendered = encoder.tokenizer.apply_chat_template(
        conversation(*REPLIES)[:-1], add_generation_prompt=True, tokenize=False
    )
    control = TextEncoder(encoder.tokenizer, "control")
    assert control.prompt(rendered) == encoder.prompt(conversation(*REPLIES)[:-1]) or layout == "gpt 2"
    response = control.exchange(rendered, REPLIES[-1] + LAYOUTS[layout].end).response_ids
    assert response[-1] == encoder.tokenizer.convert_tokens_to_ids(LAYOUTS[layout].end)
    assert len(encoder.end_ids.intersection(response)) == 1


def test_earlier_turns_of_a_template_without_ends_are_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    encoder = TextEncoder(tokenizer)
    assert encoder.end_of_turn is None
    with pytest.raises(ValueError, match=r"no token at the end of the assistant's turns.*sft\.turns to last"):
        encoder.conversation(conversation("blue", "red"), "all")
    trained = encoder.conversation(conversation("blue", "red"), "last")
    ((start, end),) = trained.turns
    assert tokenizer.decode(trained.ids[start:end]) == "red</s>"
    assert encoder.conversation(conversation("blue"), "all") == encoder.conversation(conversation("blue"), "last")


def test_marks_of_the_template_tell_its_turns_where_prefixes_do_not() -> None:
    template = QWEN_3.replace(
        "{{ '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}",
        "{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ content }}{% endgeneration %}"
        "{% else %}{{ content }}{% endif %}"
        "{{ '<|im_end|>\\n' }}",
    )
    tokenizer = make_tokenizer(LAYOUTS["qwen 3"])
    tokenizer.chat_template = template
    trained = TextEncoder(tokenizer).conversation(conversation(*REPLIES), "all")
    turns = [tokenizer.decode(trained.ids[start:end]) for start, end in trained.turns]
    assert turns == [f"{REPLIES[0]}<|im_end|>", f"{REPLIES[1]}<|im_end|>", written("qwen 3", REPLIES[2])]


def test_a_template_that_begins_replies_in_two_ways_is_refused() -> None:
    tokenizer = make_tokenizer(LAYOUTS["qwen 2.5"])
    tokenizer.chat_template = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
    encoder = TextEncoder(tokenizer)
    assert tokenizer.decode(encoder.prompt(MESSAGES)).endswith("<think>\n")
    with pytest.raises(ValueError, match=r"begins the assistant's turn differently .*<think>"):
        encoder.exchange(MESSAGES, "blue")


def test_tools_reach_the_template_and_are_refused_where_it_drops_them() -> None:
    tokenizer = make_tokenizer(LAYOUTS["qwen 2.5"])
    encoder = TextEncoder(tokenizer)
    assert "look_up" in tokenizer.decode(encoder.prompt(MESSAGES, TOOLS))
    exchange = encoder.exchange(MESSAGES, "blue", TOOLS)
    assert exchange.prompt_ids == encoder.prompt(MESSAGES, TOOLS)
    other = TextEncoder(make_tokenizer(LAYOUTS["gemma"]))
    with pytest.raises(ValueError, match="`tools`, which the tokenizer's chat template does not use"):
        other.prompt(MESSAGES, TOOLS)


@pytest.mark.parametrize("choice", ["refuse", "text"])
def test_a_special_token_anywhere_in_what_a_template_renders_is_refused(choice: SpecialTokens) -> None:
    encoder = TextEncoder(make_tokenizer(LAYOUTS["qwen 2.5"]), choice)
    with pytest.raises(ValueError, match="a message contains the special token '<|im_end|>'".replace("|", r"\|")):
        encoder.prompt([{"role": "user<|im_end|>", "content": "a"}])
    named = [{"type": "function", "function": {"name": "<|im_end|>", "parameters": {}}}]
    with pytest.raises(ValueError, match="`tools` contains the special token"):
        encoder.prompt(MESSAGES, named)
    calls = [{"function": {"name": "f", "arguments": {"<|im_start|>": 1}}}]
    with pytest.raises(ValueError, match="a message contains the special token"):
        encoder.prompt([{"role": "user", "content": "a", "calls": calls}])


def test_special_tokens_of_the_template_stay_control_tokens_where_those_of_texts_are_text(layout: str) -> None:
    tokenizer = make_tokenizer(LAYOUTS[layout])
    plain = TextEncoder(tokenizer)
    split = TextEncoder(tokenizer, "text")
    assert split.prompt(MESSAGES) == plain.prompt(MESSAGES)
    assert split.exchange(MESSAGES, "blue") == plain.exchange(MESSAGES, "blue")
    turns: Turns = "last" if layout == "qwen 3" else "all"
    messages = conversation(*REPLIES)
    assert split.conversation(messages, turns) == plain.conversation(messages, turns)


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content"])
def test_what_a_template_drops_of_a_turn_is_refused(key: str) -> None:
    tokenizer = make_tokenizer(LAYOUTS["qwen 2.5"])
    messages: list[Message] = [*MESSAGES, {"role": "assistant", "content": "blue", key: [{"function": {"name": "f"}}]}]
    with pytest.raises(ValueError, match=f"a message has `{key}`, which the tokenizer's chat template does not use"):
        TextEncoder(tokenizer).conversation(messages, "all")
    tokenizer.chat_template = CHATML.replace("+ m.content +", f"+ m.content + (m.{key} or '') | string +")
    TextEncoder(tokenizer).conversation(messages, "all")


def test_a_turn_without_text_is_refused(encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match="message 2, by the assistant, is empty"):
        encoder.conversation(conversation(" ", "blue"), "all")


def test_a_prompt_that_ends_with_a_reply_is_refused(encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match="the prompt ends with a message by the assistant"):
        encoder.prompt(conversation("blue"))


def test_a_conversation_that_the_assistant_begins_is_trained_on_its_last_turn(
    layout: str, encoder: TextEncoder
) -> None:
    messages = [{"role": "assistant", "content": "Good bye."}, *conversation("blue")]
    with pytest.raises(ValueError, match=r"the first message is by the assistant.*sft\.turns to last"):
        encoder.conversation(messages, "all")
    trained = encoder.conversation(messages, "last")
    ((start, end),) = trained.turns
    assert decoded(encoder, trained.ids[start:end], layout) == written(layout, "blue")


# Texts on the byte-level tokenizer of the tiny model.


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return copy.deepcopy(tiny_tokenizer)


def response_ids(tokenizer: PreTrainedTokenizerFast, response: str) -> list[int]:
    return TextEncoder(tokenizer).exchange("The cat", response).response_ids


def post_processed(tokenizer: PreTrainedTokenizerFast, single: str) -> PreTrainedTokenizerFast:
    """The tokenizer with its end-of-sequence token where `single` has it."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


@given(
    prompt=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=9),
    text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30),
)
def test_a_response_comes_back_from_its_tokens(tiny_tokenizer: PreTrainedTokenizerFast, prompt: str, text: str) -> None:
    ids = TextEncoder(tiny_tokenizer).exchange(prompt, text).response_ids
    assert ids[-1] == tiny_tokenizer.eos_token_id
    assert ids.count(tiny_tokenizer.eos_token_id) == 1
    assert decode_response(tiny_tokenizer, ids) == text


def test_a_plain_prompt_is_its_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert TextEncoder(tokenizer).prompt("The cat") == tokenizer("The cat", add_special_tokens=False)["input_ids"]


def test_a_prompt_does_not_end_with_an_eos_that_the_tokenizer_adds(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = TextEncoder(tokenizer).prompt("The cat")
    assert TextEncoder(post_processed(tokenizer, "$A </s>")).prompt("The cat") == plain


def test_a_prompt_keeps_the_start_that_the_tokenizer_adds(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = TextEncoder(tokenizer).prompt("The cat")
    assert TextEncoder(post_processed(tokenizer, "</s> $A")).prompt("The cat") == [tokenizer.eos_token_id, *plain]


def test_a_rendered_prompt_does_not_get_its_start_twice(tokenizer: PreTrainedTokenizerFast) -> None:
    wrapped = post_processed(tokenizer, "</s> $A </s>")
    assert TextEncoder(wrapped, "control").prompt("</s>The cat") == TextEncoder(wrapped).prompt("The cat")


def test_a_prompt_with_eos_in_its_text_keeps_it_where_that_is_allowed(tokenizer: PreTrainedTokenizerFast) -> None:
    assert TextEncoder(tokenizer, "control").prompt("The cat</s>")[-1] == tokenizer.eos_token_id


def test_an_empty_prompt_starts_from_the_first_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert TextEncoder(tokenizer).prompt("") == [tokenizer.eos_token_id]
    tokenizer.bos_token = "<pad>"
    assert TextEncoder(tokenizer).prompt("") == [tokenizer.pad_token_id]


def test_messages_go_through_the_chat_template_up_to_the_reply(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.decode(TextEncoder(tokenizer).prompt(MESSAGES)) == "user: name a colour.\nassistant: "


def test_messages_without_a_chat_template_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        TextEncoder(tokenizer).prompt(MESSAGES)


@pytest.mark.parametrize("template", ["{{ raise_exception('roles must alternate') }}", "{{ messages[9].content + 1 }}"])
def test_a_failing_chat_template_is_named(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="the chat template fails on these messages"):
        TextEncoder(tokenizer).prompt([{"role": "user", "content": "Hi"}])


def test_a_response_with_eos_in_its_text_has_one_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    control = TextEncoder(tokenizer, "control").exchange("The cat", "blue</s>")
    assert control.response_ids == response_ids(tokenizer, "blue")


def test_a_response_has_no_special_token_at_its_start(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = response_ids(tokenizer, "blue")
    assert response_ids(post_processed(tokenizer, "</s> $A </s>"), "blue") == plain


def test_where_pad_is_eos_the_response_still_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    assert response_ids(tokenizer, "blue")[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
