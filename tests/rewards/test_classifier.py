import copy
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from policies.errors import UserError
from policies.text.tokenization import Prompt
from rewards.classifier import Classifier

PROMPTS: list[Prompt] = ["User: name a colour.", "The cat", "Is it?", "A long answer is a long answer;"]
RESPONSES = [" Blue is a colour, and so is red.", "", " No", " a short answer is a good one."]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def make(
    folder: Path, tokenizer: PreTrainedTokenizerFast, outputs: int = 1, family: str = "llama", pad: int | None = 0
) -> str:
    """A random classifier of one layer with a tokenizer; its scores are of order one."""
    torch.manual_seed(5)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_labels": outputs, "initializer_range": 0.5, "pad_token_id": pad}
    llama, bert = (LlamaForSequenceClassification, LlamaConfig), (BertForSequenceClassification, BertConfig)
    model, config = llama if family == "llama" else bert
    model(config(**sizes, **heads)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def alone(path: str, texts: list[str]) -> torch.Tensor:
    """Logits `[N, outputs]` of one text at a time, by transformers as it comes."""
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(path).eval(),
        AutoTokenizer.from_pretrained(path),
    )
    with torch.no_grad():
        return torch.cat([model(torch.tensor([tokenizer(text)["input_ids"]])).logits for text in texts])


TEXTS = [f"{prompt}{response}" for prompt, response in zip(PROMPTS, RESPONSES)]


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_one_output_is_the_score_whatever_the_batch(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, family: str, tokens: int
) -> None:
    path = make(tmp_path, tiny_tokenizer, family=family)
    scores, expected = Classifier(path, tokens=tokens).score(PROMPTS, RESPONSES), alone(path, TEXTS)[:, 0]
    assert float(expected.sort().values.diff().min()) > 1e-3
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_two_outputs_give_the_log_odds_of_the_second(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = make(tmp_path, tiny_tokenizer, outputs=2)
    probabilities = alone(path, TEXTS).double().softmax(-1)
    expected = (probabilities[:, 1] / probabilities[:, 0]).log().float()
    torch.testing.assert_close(Classifier(path).score(PROMPTS, RESPONSES), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt", ["Hi", [{"role": "user", "content": "Hi"}]])
def test_a_chat_template_is_used_for_prompts_of_either_form(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, prompt: Prompt
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    path = make(tmp_path, tokenizer)
    expected = alone(path, ["[user]Hi[assistant]Hello"])[:, 0]
    torch.testing.assert_close(Classifier(path).score([prompt], ["Hello"]), expected, rtol=1e-4, atol=1e-4)


def test_messages_without_a_chat_template_are_scored_as_text(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = make(tmp_path, tiny_tokenizer)
    scores = Classifier(path).score([[{"role": "user", "content": "Hi"}]], [" Hello"])
    torch.testing.assert_close(scores, alone(path, ["user: Hi Hello"])[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pad", [None, 0])
def test_without_a_pad_token_padding_changes_no_score(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, pad: int | None
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = None
    path = make(tmp_path, tokenizer, pad=pad)
    scores = Classifier(path).score(PROMPTS, RESPONSES)
    torch.testing.assert_close(scores, alone(path, TEXTS)[:, 0], rtol=1e-4, atol=1e-4)


def test_three_outputs_are_refused(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"has 3 outputs; 1 \(a score\) or 2 \(classes\) were expected"):
        Classifier(make(tmp_path, tiny_tokenizer, outputs=3))


def test_a_model_without_a_trained_head_is_refused(tiny_model: Path) -> None:
    with pytest.raises(
        UserError, match=r"weights of LlamaForSequenceClassification: score\.weight; they are weights of another kind"
    ):
        Classifier(str(tiny_model))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        Classifier(str(tmp_path / "nowhere"))


def test_damaged_weights_are_named(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    weights = Path(make(tmp_path, tiny_tokenizer)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"reward\.classifier: .* cannot be loaded"):
        Classifier(str(tmp_path))
