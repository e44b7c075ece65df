"""Prompts that are too long for a classifier lose their start; responses stay complete."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from policies.errors import UserError
from policies.text.tokenization import Message
from rewards.classifier import Classifier
from rewards.terms.base import TermInput
from rewards.terms.classifier import ClassifierScorer
from tests.rewards.classifiers import TURNS, alone, encoded, make, with_changes

POSITIONS = 60
LONG = 2 * "User: name a colour. The cat sat on the mat, and the dog sat by the door. Is a long answer a good answer? "
RESPONSES = [" Blue is a colour.", " So is red.", " A short answer is good."]
ROOM = {"bert": 60, "roberta": 59, "opt": 60, "gpt2": 60, "llama": 60}
"""Positions that the families' tables have for tokens; RoBERTa's first are those of padding (id 0) and before."""


def fit_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str, limit: int = 10**30) -> str:
    tokenizer.model_max_length = limit
    return make(tmp_path, tokenizer, family, positions=POSITIONS)


@pytest.mark.parametrize("limit", [10**30, 8, 60], ids=["no limit", "a smaller limit", "the limit"])
@pytest.mark.parametrize("family", ROOM)
def test_the_prompt_is_cut_from_its_start_and_special_tokens_stay(
    family: str, limit: int, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = fit_model(tmp_path, with_changes(tiny_tokenizer, first="</s>"), family, limit)
    expected: list[list[int]] = []
    for response in RESPONSES:
        ids = encoded(path, LONG, response)
        expected.append(ids[:1] + ids[1 - ROOM[family] :])
    classifier = Classifier(path)
    scores = classifier.score([LONG] * 3, RESPONSES)
    torch.testing.assert_close(scores, alone(path, expected), rtol=1e-4, atol=1e-4)
    assert float(scores.sort().values.diff().min()) > 1e-3


@pytest.mark.parametrize("family", ["t5", "bloom", "xlnet"])
def test_relative_positions_have_no_limit(family: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = fit_model(tmp_path, with_changes(tiny_tokenizer, TURNS), family, limit=60)
    prompt = 12 * LONG
    expected = alone(path, [encoded(path, prompt, response) for response in RESPONSES])
    torch.testing.assert_close(Classifier(path).score([prompt] * 3, RESPONSES), expected, rtol=1e-4, atol=1e-4)


def test_a_long_only_turn_loses_its_start_and_the_template_stays(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = fit_model(tmp_path, with_changes(tiny_tokenizer, TURNS), "bert")
    system: Message = {"role": "system", "content": "Be kind."}
    encoder = Classifier(path).encoder
    for response in RESPONSES:
        ids, shortened = encoder.encode([system, {"role": "user", "content": LONG}], response)
        text = AutoTokenizer.from_pretrained(path).decode(ids)
        before, _, rest = text.partition("[user]")
        kept, _, reply = rest.partition("[assistant]")
        assert shortened
        assert (before, reply) == ("[system]Be kind.", f"{response}</s>")
        assert LONG.endswith(kept)
        assert POSITIONS - 2 <= len(ids) <= POSITIONS


def test_the_earliest_exchanges_are_left_out_first(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = fit_model(tmp_path, with_changes(tiny_tokenizer, TURNS), "bert")
    system: Message = {"role": "system", "content": "ok"}
    early: list[Message] = [
        {"role": "user", "content": "The cat sat on the mat."},
        {"role": "assistant", "content": "A colour."},
    ]
    late: list[Message] = [{"role": "user", "content": "Is it?"}]
    conversation = [system, *early, *early, *late]
    expected = encoded(path, [system, *late], " No")
    assert Classifier(path).encoder.encode(conversation, " No") == (expected, True)


def test_the_system_message_is_cut_last(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = fit_model(tmp_path, with_changes(tiny_tokenizer, TURNS), "bert")
    messages: list[Message] = [{"role": "system", "content": LONG}, {"role": "user", "content": "Is it?"}]
    ids, _ = Classifier(path).encoder.encode(messages, " No")
    text = AutoTokenizer.from_pretrained(path).decode(ids)
    system, _, rest = text.partition("[user]")
    assert rest == "[assistant] No</s>"
    assert LONG.endswith(system.removeprefix("[system]"))
    assert messages[1]["content"] == "Is it?"


@pytest.mark.parametrize("template", [None, TURNS])
def test_a_response_that_does_not_fit_alone_is_refused(
    template: str | None, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = fit_model(tmp_path, with_changes(tiny_tokenizer, template), "gpt2")
    with pytest.raises(UserError, match=r"reward\.classifier: a response is \d+ tokens long .* has 60 positions"):
        Classifier(path).score(["The cat"], [LONG + LONG])


def test_shortened_prompts_are_counted_and_said_once(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = fit_model(tmp_path, with_changes(tiny_tokenizer), "gpt2")
    scorer = ClassifierScorer(Classifier(path, key="reward.terms.kind.path"), "kind")
    rows: list[dict[str, Any]] = [{}] * 3
    batch = TermInput([LONG, "The cat", LONG], lambda: RESPONSES, rows, [4, 4, 4])
    with caplog.at_level(logging.WARNING):
        notes = scorer(batch).notes
        scorer(batch)
    assert notes["shortened/kind"].tolist() == [1.0, 0.0, 1.0]
    said = [record.getMessage() for record in caplog.records if record.name == "rewards.classifier"]
    expected = "2 of 3 prompts are too long for the model's 60 positions; it reads them without their start"
    assert said == [f"reward.terms.kind.path: {expected}"]


def test_a_template_that_fails_is_a_user_error(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    )
    path = fit_model(tmp_path, with_changes(tiny_tokenizer, template), "gpt2")
    with pytest.raises(UserError, match=r"reward\.classifier: its chat template fails on these messages: no tools"):
        Classifier(path).score([[{"role": "tool", "content": "1"}]], ["Hello"])
