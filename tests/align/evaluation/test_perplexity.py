"""Perplexity of documents: each token is scored once, as a slow oracle scores it."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from align.config.schema import SftSettings, SourceSettings
from align.data.documents import Document, demonstration_document, read_documents, windows
from align.data.examples import TokenizedDemonstration
from align.evaluation.intervals import ratio_interval
from align.evaluation.perplexity import ScoredDocuments, document_nats, perplexity_figures
from policies.build import build_trunk
from policies.errors import UserError
from policies.schema import ModelSettings, PolicySettings
from policies.text.encoder import TextEncoder
from tests.integration.tiny_run import write_rows

WINDOW = 10


@st.composite
def demonstrations(draw: st.DrawFn) -> TokenizedDemonstration:
    length = draw(st.integers(2, 60))
    bounds = draw(st.lists(st.integers(1, length), min_size=2, max_size=6, unique=True).filter(lambda b: len(b) > 1))
    ordered = sorted(bounds)
    turns = list(zip(ordered[::2], ordered[1::2], strict=False))
    return TokenizedDemonstration(list(range(length)), turns)


@given(demonstrations(), st.integers(2, 20))
def test_each_token_is_scored_in_one_window_with_half_a_window_of_context(
    demonstration: TokenizedDemonstration, tokens: int
) -> None:
    scored = []
    for window in windows(demonstration, tokens):
        assert window.length <= tokens
        assert window.ids == list(range(window.ids[0], window.ids[0] + window.length))
        for start, end in window.turns:
            for place in range(start, end):
                token = window.ids[place]
                scored.append(token)
                assert place >= min(token, tokens // 2)
    expected = [token for start, end in demonstration.turns for token in range(start, end)]
    assert scored == expected


def test_a_document_that_fits_is_one_window() -> None:
    demonstration = TokenizedDemonstration(list(range(8)), [(2, 4), (6, 8)])
    assert windows(demonstration, 8) == [demonstration]


def nats_by_token(model: Path, ids: list[int], turns: list[tuple[int, int]]) -> float:
    """A forward pass in float64 for each token, over the window that the documentation says."""
    causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    stride = WINDOW // 2
    total = 0.0
    for start, end in turns:
        for place in range(start, end):
            first = 0
            while place >= first + WINDOW:
                first += stride
            with torch.no_grad():
                logits = causal(input_ids=torch.tensor([ids[first:place]])).logits[0, -1]
            total -= float(logits.log_softmax(-1)[ids[place]])
    return total


def test_the_likelihood_is_that_of_a_forward_pass_for_each_token(tiny_model: Path) -> None:
    pick = torch.Generator().manual_seed(0)
    turns = [[(1, 33)], [(4, 9), (12, 27)], [(1, 10)], [(1, 2)]]
    documents = []
    for spans in turns:
        ids = torch.randint(2, 290, (spans[-1][1],), generator=pick).tolist()
        documents.append(Document(TokenizedDemonstration(ids, spans), size=1))
    trunk = build_trunk(ModelSettings(path=str(tiny_model), dtype="float32"), PolicySettings(rank=2), ("reference",))
    expected = [nats_by_token(tiny_model, d.demonstration.ids, d.demonstration.turns) for d in documents]
    for microbatch_tokens in (12, 1000):
        measured = document_nats(trunk, "base", documents, WINDOW, microbatch_tokens)
        torch.testing.assert_close(measured, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_perplexity_is_over_all_tokens_and_bits_are_over_all_bytes() -> None:
    nats = torch.tensor([2.0, 6.0], dtype=torch.float64)
    tokens = torch.tensor([1.0, 3.0], dtype=torch.float64)
    sizes = torch.tensor([4.0, 12.0], dtype=torch.float64)
    figures = perplexity_figures(nats, tokens, sizes)
    assert figures["perplexity"] == pytest.approx(math.exp(8 / 4))
    assert figures["bits_per_byte"] == pytest.approx(8 / 16 / math.log(2))
    # Both documents have the same nats per token, so that nothing varies.
    assert figures["perplexity_low"] == pytest.approx(figures["perplexity"])
    assert figures["bits_per_byte_high"] == pytest.approx(figures["bits_per_byte"])


def test_the_ratio_is_over_the_same_documents() -> None:
    """Documents differ by much and the change is the same for all: its interval is narrow, theirs are wide."""
    base = torch.tensor([1.0, 20.0, 3.0], dtype=torch.float64)
    tokens = torch.tensor([4.0, 5.0, 6.0], dtype=torch.float64)
    scored = ScoredDocuments({"base": base, "sft": base + 0.1 * tokens}, tokens, tokens)
    figures = scored.figures()
    sft = figures["models"]["sft"]
    assert figures["documents"] == 3
    assert figures["tokens"] == figures["bytes"] == 15
    assert sft["perplexity_ratio"] == pytest.approx(math.exp(0.1))
    assert sft["perplexity_ratio_low"] == pytest.approx(sft["perplexity_ratio_high"])
    assert sft["perplexity_low"] < 0.1 * sft["perplexity"]
    assert "perplexity_ratio" not in figures["models"]["base"]


def test_one_document_has_no_interval_and_no_bytes_have_no_bits() -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert ratio_interval(one, one) is None
    assert perplexity_figures(one, one, torch.zeros(1)) == {"perplexity": pytest.approx(math.e)}


def test_texts_are_read_whole_and_demonstrations_by_their_turns(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    encoder = TextEncoder(tiny_tokenizer)
    text = "The naïve cat " * 40
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text}, {"prompt": "Two plus", "completion": " three."}])
    whole, turn = read_documents(SourceSettings(path=rows), encoder, SftSettings(max_tokens=8), "perplexity")
    assert whole.demonstration.is_text
    assert whole.size == len(text.encode())
    assert turn.size == len(" three.")
    assert turn == demonstration_document(turn.demonstration, tiny_tokenizer)
    (tmp_path / "page.md").write_text(text)
    assert read_documents(SourceSettings(path=str(tmp_path / "page.md")), encoder, SftSettings(), "p") == [whole]
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": text}, {"txt": text}])
    with pytest.raises(UserError, match=r"perplexity: .*bad.jsonl:2: .*prompt"):
        read_documents(SourceSettings(path=bad), encoder, SftSettings(), "perplexity")
