"""Text decoded token by token is the text of all tokens, with no half of a character on the way."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from policies.text.incremental import IncrementalText
from policies.text.tokenization import decode_response
from tests.conftest import LINES

HALVES = "\N{REPLACEMENT CHARACTER}"
EMOJI = "Yes 👩‍🚀 naïve 🇩🇪 日本 ok"


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: Metaspace, and one token per byte for characters outside the vocabulary."""
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_letters, ".", ","]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    replace = decoders.Replace("▁", " ")
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """As T5's: Metaspace, and an unknown token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def cleaning() -> PreTrainedTokenizerFast:
    """Words whose spaces before punctuation transformers removes afterwards."""
    words = ["<unk>", "</s>", "do", "n", "'", "t", "n't", ".", "?", "you", "'s", "we", "'ve", "said"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=True
    )


TOKENIZERS = {kind.__name__: kind() for kind in (byte_level, byte_fallback, unigram, cleaning)}


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    text = IncrementalText(tokenizer)
    found = [text.add(token) for token in ids]
    return [*found, text.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", [EMOJI, "The cat sat.  A long answer, two dogs", " you do n ' t . we 've said ?"])
def test_pieces_join_to_the_text_of_all_tokens(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert "".join(pieces(tokenizer, ids)) == decode_response(tokenizer, ids)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_no_half_of_a_character_is_given(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(EMOJI)["input_ids"]
    found = pieces(tokenizer, ids)
    assert "".join(found) == EMOJI
    assert HALVES not in "".join(found)
    assert len([piece for piece in found if piece]) > 5  # in pieces, not all at once


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_any_tokens_in_any_order_join_to_their_text(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=30))
    assert "".join(pieces(tokenizer, ids)) == decode_response(tokenizer, ids)


def test_a_word_is_given_with_its_last_token() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer("The cat sat on the mat")["input_ids"]
    text = IncrementalText(tokenizer)
    given_so_far = ""
    for count, token in enumerate(ids, start=1):
        given_so_far += text.add(token)
        assert given_so_far == decode_response(tokenizer, ids[:count])
