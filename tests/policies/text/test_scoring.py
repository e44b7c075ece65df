"""An exported reward model's tokenizer gives the tokens that the run scores, by transformers' own calls."""

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from policies.text.encoder import TextEncoder
from policies.text.scoring import scoring_tokenizer
from policies.text.tokenization import Message
from tests.policies.text.layouts import CHATML, LAYOUTS, make_tokenizer

TEXTS = (("My lamp is broken.", " Is the bulb old?"), ("Name a colour:", " blue\n"), ("a", " No, it is new. Thanks! "))
REPLIES = ("Is the bulb old?", "Then check\nthe fuse \N{ELECTRIC PLUG}", "Good bye.")
WITHOUT_END = (
    "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
WHOLE = [name for name in LAYOUTS if name != "gpt 2"]
"""Layouts whose templates begin the assistant's turn where a token begins, whatever the turn is."""


def saved(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """The scoring tokenizer as transformers loads it."""
    scoring_tokenizer(tokenizer).save_pretrained(folder)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


def conversations() -> list[tuple[list[Message], str]]:
    first: list[Message] = [{"role": "user", "content": "My lamp is broken."}]
    longer = [*first, {"role": "assistant", "content": REPLIES[0]}, {"role": "user", "content": "No, it is new."}]
    return [(first, REPLIES[0]), (longer, REPLIES[1]), (longer, REPLIES[2])]


def check(tokenizer: PreTrainedTokenizerBase, exported: PreTrainedTokenizerBase) -> None:
    """Texts and messages, alone and padded, are encoded as the run encodes them."""
    encoder = TextEncoder(tokenizer)
    texts = [encoder.exchange(prompt, response) for prompt, response in TEXTS]
    expected = [text.prompt_ids + text.response_ids for text in texts]
    padded = exported([prompt + response for prompt, response in TEXTS], padding=True)
    assert unpadded(padded["input_ids"], padded["attention_mask"]) == expected
    assert all(last_not_padding(ids, exported) == own[-1] for ids, own in zip(padded["input_ids"], expected))
    replies = [encoder.exchange(messages, response) for messages, response in conversations()]
    expected = [reply.prompt_ids + reply.response_ids for reply in replies]
    complete = [[*messages, {"role": "assistant", "content": response}] for messages, response in conversations()]
    padded = exported.apply_chat_template(complete, padding=True, return_dict=True)
    assert unpadded(padded["input_ids"], padded["attention_mask"]) == expected
    assert all(last_not_padding(ids, exported) == own[-1] for ids, own in zip(padded["input_ids"], expected))


def unpadded(ids: Sequence[list[int]], masks: Sequence[list[int]]) -> list[list[int]]:
    return [row[: sum(mask)] for row, mask in zip(ids, masks, strict=True)]


def last_not_padding(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """The token whose logits transformers' classifiers give."""
    return [token for token in ids if token != tokenizer.pad_token_id][-1]


@pytest.mark.parametrize("layout", WHOLE)
def test_texts_and_messages_end_where_the_run_scores_them(layout: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(LAYOUTS[layout])
    check(tokenizer, saved(tokenizer, tmp_path))


@pytest.mark.parametrize("layout", WHOLE)
@pytest.mark.parametrize("pad", [None, "eos", "end of turn"])
def test_padding_is_never_the_token_that_is_scored(layout: str, pad: str | None, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(LAYOUTS[layout])
    tokens = {"eos": LAYOUTS[layout].eos, "end of turn": LAYOUTS[layout].end}
    tokenizer.pad_token = tokens[pad] if pad else None
    check(tokenizer, saved(tokenizer, tmp_path))


def test_a_template_that_writes_no_end_gets_eos(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(LAYOUTS["gpt 2"])
    tokenizer.chat_template = WITHOUT_END
    check(tokenizer, saved(tokenizer, tmp_path))


@pytest.mark.parametrize("flags", [{"add_bos_token": True, "add_eos_token": False}, {"add_bos_token": True}])
def test_tokenizers_that_rebuild_their_post_processor(flags: dict[str, bool], tmp_path: Path) -> None:
    made = make_tokenizer(LAYOUTS["gemma"])
    made.save_pretrained(tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made", **flags)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    check(tokenizer, saved(tokenizer, tmp_path / "exported"))


def test_a_prompt_alone_is_rendered_as_before(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(LAYOUTS["qwen 2.5"])
    exported = saved(tokenizer, tmp_path)
    messages, _ = conversations()[1]
    for options in {"add_generation_prompt": True}, {"add_generation_prompt": False}:
        expected = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert exported.apply_chat_template(messages, tokenize=False, **options) == expected


def test_a_template_begins_and_ends_as_it_did(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(LAYOUTS["qwen 2.5"])
    tokenizer.chat_template = "\n{# a remark #}\n" + CHATML + "  {% if true %}{% endif %}\n"
    exported = saved(tokenizer, tmp_path)
    messages, _ = conversations()[1]
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    assert expected.startswith("\n<")
    assert exported.apply_chat_template(messages, tokenize=False) == expected


def test_a_tokenizer_without_a_template_keeps_none(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    exported = saved(tokenizer, tmp_path)
    assert exported.chat_template is None
    assert exported("a")["input_ids"] == [*tokenizer("a")["input_ids"], tokenizer.eos_token_id]
    assert tokenizer("a")["input_ids"] == tiny_tokenizer("a")["input_ids"]
