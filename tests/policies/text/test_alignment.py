"""The token that completes a character, against a search over all prefixes."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from policies.text.alignment import TextAlignment
from policies.text.tokenization import decode_response
from tests.policies.text.test_incremental import EMOJI, TOKENIZERS


def last_wrong_prefix(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], characters: int) -> int:
    """The last token up to which the beginning of the text is still another one; -1: there is none."""
    beginning = decode_response(tokenizer, ids)[:characters]
    wrong = [t for t in range(len(ids)) if decode_response(tokenizer, ids[: t + 1])[:characters] != beginning]
    return max(wrong, default=-1)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_a_character_is_complete_after_the_last_prefix_that_lacks_it(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), min_size=1, max_size=24))
    alignment = TextAlignment(tokenizer, ids)
    for characters in range(1, len(alignment.text) + 1):
        assert alignment.completing_token(characters) == last_wrong_prefix(tokenizer, ids, characters) + 1


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_a_character_of_several_tokens_is_completed_by_the_last_of_them(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = [*tokenizer(EMOJI)["input_ids"], tokenizer.eos_token_id]
    alignment = TextAlignment(tokenizer, ids)
    assert alignment.text == EMOJI
    for start, character in enumerate(EMOJI):
        token = alignment.completing_token(start + 1)
        assert decode_response(tokenizer, ids[: token + 1])[: start + 1] == EMOJI[: start + 1]
        assert not decode_response(tokenizer, ids[:token]).startswith(EMOJI[:start] + character)
    assert alignment.completing_token(len(EMOJI)) == len(ids) - 2  # the end-of-sequence token has no text


def test_an_id_without_text_between_the_bytes_of_a_character_leaves_it_open() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    byte_0, byte_128 = tokenizer.convert_tokens_to_ids(["<0x00>", "<0x80>"])
    ids = [byte_0, len(tokenizer), byte_128]  # together no valid UTF-8, so that the first byte becomes U+FFFD too
    assert TextAlignment(tokenizer, ids).completing_token(1) == 2


@pytest.mark.parametrize("characters", [0, 4])
def test_characters_outside_the_text_are_refused(characters: int) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    with pytest.raises(ValueError, match="the text has 3"):
        TextAlignment(tokenizer, tokenizer("cat")["input_ids"]).completing_token(characters)
