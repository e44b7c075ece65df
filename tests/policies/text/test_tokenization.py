import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from policies.text.tokenization import decode_response, encode_prompt, encode_response, prompt_text

MESSAGES = [{"role": "user", "content": "name a colour."}]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return copy.deepcopy(tiny_tokenizer)


def post_processed(tokenizer: PreTrainedTokenizerFast, single: str) -> PreTrainedTokenizerFast:
    """The tokenizer with its end-of-sequence token where `single` has it."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_a_response_comes_back_from_its_tokens(tiny_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = encode_response(tiny_tokenizer, text)
    assert ids[-1] == tiny_tokenizer.eos_token_id
    assert ids.count(tiny_tokenizer.eos_token_id) == 1
    assert decode_response(tiny_tokenizer, ids) == text


def test_a_plain_prompt_is_its_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_prompt(tokenizer, "The cat") == tokenizer("The cat", add_special_tokens=False)["input_ids"]


def test_a_prompt_does_not_end_with_an_eos_that_the_tokenizer_adds(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = encode_prompt(tokenizer, "The cat")
    assert encode_prompt(post_processed(tokenizer, "$A </s>"), "The cat") == plain


def test_a_prompt_keeps_the_start_that_the_tokenizer_adds(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = encode_prompt(tokenizer, "The cat")
    assert encode_prompt(post_processed(tokenizer, "</s> $A"), "The cat") == [tokenizer.eos_token_id, *plain]


def test_a_prompt_with_eos_in_its_text_keeps_it(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_prompt(tokenizer, "The cat</s>")[-1] == tokenizer.eos_token_id


def test_an_empty_prompt_starts_from_the_first_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_prompt(tokenizer, "") == [tokenizer.eos_token_id]
    tokenizer.bos_token = "<pad>"
    assert encode_prompt(tokenizer, "") == [tokenizer.pad_token_id]


def test_messages_go_through_the_chat_template_up_to_the_reply(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.decode(encode_prompt(tokenizer, MESSAGES)) == "user: name a colour.\nassistant: "


def test_messages_without_a_chat_template_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(tokenizer, MESSAGES)


@pytest.mark.parametrize("template", ["{{ raise_exception('roles must alternate') }}", "{{ messages[9].content + 1 }}"])
def test_a_failing_chat_template_is_named(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="the chat template fails on these messages"):
        encode_prompt(tokenizer, [{"role": "user", "content": "Hi"}])


def test_a_response_with_eos_in_its_text_has_one_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_response(tokenizer, "blue</s>") == encode_response(tokenizer, "blue")


def test_a_response_has_no_special_token_at_its_start(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = encode_response(tokenizer, "blue")
    assert encode_response(post_processed(tokenizer, "</s> $A </s>"), "blue") == plain


def test_where_pad_is_eos_the_response_still_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    assert encode_response(tokenizer, "blue")[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_messages_as_text_for_people() -> None:
    assert prompt_text(MESSAGES) == "user: name a colour."
    assert prompt_text("as it is") == "as it is"
