"""Base models made from nothing: their tokenizers, configurations and weights."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policies.errors import UserError
from policies.files.base_model import load_base, load_tokenizer
from policies.files.made_base import make_config, random_model, train_tokenizer, write_base
from policies.schema import ModelSettings, TokenizerSettings
from policies.text.encoder import TextEncoder

TEXTS = [f"The cat number {number} sat on the mat, and the dog by the door." for number in range(60)]
SMALL = TokenizerSettings(vocab_size=320)
TOKENIZER = train_tokenizer(TEXTS, SMALL)
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = [
    LLAMA,
    LLAMA | {"model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 1},
    {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "num_hidden_layers": 2},
]


@given(st.text())
def test_any_text_is_encoded_and_decoded(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert TOKENIZER.decode(ids) == text


def test_the_tokenizer_has_the_size_that_is_set_and_merges_what_is_frequent() -> None:
    assert len(TOKENIZER) == 320
    for word in (" the", " cat", " mat"):
        assert len(TOKENIZER.tokenize(word)) == 1
    assert len(TOKENIZER.tokenize(" zebra")) > 1
    assert TOKENIZER.convert_tokens_to_ids(["<pad>", "<s>", "</s>"]) == [0, 1, 2]


def test_merges_are_those_of_a_slow_count_of_pairs() -> None:
    words = ["abc"] * 5 + ["bc"] * 4 + ["de"] * 2 + ["ab"]
    expected = slow_merges(words, 4)
    trained = train_tokenizer(words, TokenizerSettings(vocab_size=300))
    learned = [
        token for token, number in sorted(trained.get_vocab().items(), key=lambda item: item[1]) if number >= 259
    ]
    assert learned[:4] == expected


def slow_merges(words: list[str], count: int) -> list[str]:
    """The first pairs that BPE merges: the most frequent one, again and again. Ties do not occur in these words."""
    pieces = [list(word) for word in words]
    merged = []
    for _ in range(count):
        counts: dict[tuple[str, str], int] = {}
        for word in pieces:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        most = max(counts.values())
        (pair,) = [pair for pair, frequency in counts.items() if frequency == most]
        merged.append("".join(pair))
        for number, word in enumerate(pieces):
            pieces[number] = merge(word, pair)
    return merged


def merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    position = 0
    while position < len(word):
        if tuple(word[position : position + 2]) == pair:
            merged.append("".join(pair))
            position += 2
        else:
            merged.append(word[position])
            position += 1
    return merged


def test_special_tokens_are_single_tokens() -> None:
    tokenizer = train_tokenizer(TEXTS, TokenizerSettings(special_tokens=["<|im_start|>", "<|im_end|>"]))
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [3, 4]
    with pytest.raises(UserError, match=r"model\.tokenizer\.special_tokens: expected names, each once"):
        train_tokenizer(TEXTS, TokenizerSettings(special_tokens=["</s>"]))


@pytest.mark.parametrize("architecture", FAMILIES, ids=lambda architecture: architecture["model_type"])
def test_a_base_is_loaded_as_any_model_and_is_the_same_for_the_same_seed(
    architecture: dict[str, Any], tmp_path: Path
) -> None:
    config = make_config(architecture, TOKENIZER)
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        torch.manual_seed(len(name))
        write_base(tmp_path / name, TOKENIZER, config, seed)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    contents = {
        name: [(tmp_path / name / file).read_bytes() for file in files] for name in ("first", "second", "other")
    }
    assert contents["first"] == contents["second"]
    assert contents["first"] != contents["other"]
    model = load_base(ModelSettings(path=str(tmp_path / "first"), dtype="float32"))
    assert model.config.num_hidden_layers == 2
    assert model.get_input_embeddings().num_embeddings == len(TOKENIZER)
    assert load_tokenizer(str(tmp_path / "first")).eos_token_id == model.config.eos_token_id == 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown family": ({"model_type": "lama"}, r"model_type 'lama' is not a causal .*: did you mean llama\?"),
    "no decoder": ({"model_type": "wav2vec2"}, "is not a causal language model"),
    "unknown key": ({"hiden_size": 16}, r"architecture\.hiden_size is not a key of LlamaConfig: did you mean hidden_"),
    "key without effect": ({"output_attentions": True}, r"output_attentions is not a key of LlamaConfig"),
    "key of the tokenizer": ({"vocab_size": 32}, r"vocab_size follows from the tokenizer: remove it"),
    "wrong type": ({"hidden_size": "wide"}, r"Field 'hidden_size' expected int"),
    "wrong sizes": ({"hidden_size": 30, "num_attention_heads": 4}, "not a multiple of the number of attention heads"),
    "unknown activation": ({"hidden_act": "reluu"}, "reluu"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("with_weights", [True, False])
def test_an_impossible_architecture_is_refused(case: str, with_weights: bool, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as refused:
        write_base(tmp_path, TOKENIZER, make_config(LLAMA | change, TOKENIZER), 0, with_weights)
    assert str(refused.value).startswith("model.architecture")
    assert not list(tmp_path.iterdir())


def test_weights_have_the_spread_that_the_configuration_sets() -> None:
    config = make_config(LLAMA | {"hidden_size": 64, "initializer_range": 0.125}, TOKENIZER)
    weight = random_model(config, 0).get_input_embeddings().weight
    assert weight.std().item() == pytest.approx(0.125, rel=0.05)


def test_texts_in_training_and_prompts_begin_alike() -> None:
    encoder = TextEncoder(TOKENIZER)
    trained = encoder.exchange("", "The cat sat.")
    assert trained.prompt_ids == [TOKENIZER.bos_token_id]
    assert trained.response_ids[-1] == TOKENIZER.eos_token_id
    prompt = encoder.prompt("The cat")
    assert prompt == (trained.prompt_ids + trained.response_ids)[: len(prompt)]
