"""A classifier scores texts in a batch as plain transformers scores each of them alone."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from policies.text.tokenization import Prompt
from rewards.classifier import Classifier
from tests.rewards.classifiers import EOS, TURNS, alone, encoded, make, with_changes

PROMPTS: list[Prompt] = ["User: name a colour.", "The cat", "Is it? <pad></s>", "A long answer is a long answer;", "a"]
RESPONSES = [" Blue is a colour, and so is red.", " sat", " No</s>", " a short answer is a good one.", " <pad>"]


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("template", [None, TURNS], ids=["text", "turns that end with EOS"])
@pytest.mark.parametrize("tokenizer_pad", [None, "<pad>", "</s>"])
@pytest.mark.parametrize("pad", [None, -1, 0, EOS])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_batch_is_scored_as_each_text_alone(
    family: str,
    pad: int | None,
    tokenizer_pad: str | None,
    template: str | None,
    tokens: int,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    path = make(tmp_path, with_changes(tiny_tokenizer, template, tokenizer_pad), family, pad)
    sequences = [encoded(path, prompt, response) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    expected = alone(path, sequences)
    assert float(expected.sort().values.diff().min()) > 1e-3
    scores = Classifier(path, tokens=tokens).score(PROMPTS, RESPONSES)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["roberta", "opt", "xlnet", "t5", "bloom"])
def test_families_that_find_positions_or_ends_in_their_own_ways(
    family: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = make(tmp_path, with_changes(tiny_tokenizer, TURNS), family)
    prompts = [prompt for prompt in PROMPTS if "<pad>" not in prompt]
    responses = [*RESPONSES[: len(prompts) - 1], " blue</s> red"]
    sequences = [encoded(path, prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    scores = Classifier(path).score(prompts, responses)
    torch.testing.assert_close(scores, alone(path, sequences), rtol=1e-4, atol=1e-4)
