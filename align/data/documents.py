"""Documents whose likelihood is measured, and the windows in which a model reads them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.config.schema import SftSettings, SourceSettings
from align.data.examples import TokenizedDemonstration, tokenized_demonstration, turns_within
from align.data.forms import read_source_rows
from align.data.parsing import Demonstration, parse_demonstration, parse_rows
from policies.errors import UserError
from policies.text.encoder import TextEncoder
from policies.text.tokenization import decode_response


@dataclass(frozen=True)
class Document:
    """A text, or a demonstration of which the trained turns are scored.

    Attributes:
        demonstration: Its tokens, and which of them are scored.
        size: Bytes in UTF-8 of the text that is scored.
    """

    demonstration: TokenizedDemonstration
    size: int


def read_documents(source: SourceSettings, encoder: TextEncoder, settings: SftSettings, where: str) -> list[Document]:
    """Read texts, and demonstrations of any form, as SFT does, but of any length.

    Args:
        source: Files with rows; a .txt or .md file is one row.
        encoder: Of the model's tokenizer.
        settings: Which turns of a demonstration are scored.
        where: What names the source, for messages.

    Raises:
        UserError: The source cannot be read, or a row is not valid.
    """

    def parse(values: Mapping[str, Any]) -> Document:
        demonstration = tokenized_demonstration(encoder, settings, values)
        row = parse_demonstration(values)
        if isinstance(row, Demonstration):
            return Document(demonstration, _bytes_of(row.completion))
        return demonstration_document(demonstration, encoder.tokenizer)

    try:
        return parse_rows(read_source_rows(source, "demonstrations"), parse, "error", can_skip=False).items
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def demonstration_document(demonstration: TokenizedDemonstration, tokenizer: PreTrainedTokenizerBase) -> Document:
    """A demonstration as a document; its size is that of its decoded turns, special tokens left out."""
    turns = [demonstration.ids[start:end] for start, end in demonstration.turns]
    return Document(demonstration, sum(_bytes_of(decode_response(tokenizer, ids)) for ids in turns))


def _bytes_of(text: str) -> int:
    return len(text.encode())


def windows(demonstration: TokenizedDemonstration, tokens: int) -> list[TokenizedDemonstration]:
    """The windows in which a demonstration is read so that each of its scored tokens is scored once.

    A demonstration that fits is one window. Of a longer one, each window begins half a window after the one before it,
    and only the tokens that no earlier window has are scored: each after half a window of context at least.

    Args:
        demonstration: The demonstration.
        tokens: The size of a window, at least 2; a prompt's tokens count.

    Returns:
        The windows that have scored tokens, in order; their `turns` are the tokens to score.
    """
    parts = []
    for start, scored, end in _spans(demonstration.length, tokens):
        if turns := turns_within(demonstration.turns, max(scored, 1), end):
            shifted = [(first - start, last - start) for first, last in turns]
            parts.append(TokenizedDemonstration(demonstration.ids[start:end], shifted, dataset=demonstration.dataset))
    return parts


def _spans(length: int, tokens: int) -> Iterator[tuple[int, int, int]]:
    """Of each window its first token, the first that no earlier window has, and one past its last."""
    stride = tokens // 2
    later = max(0, math.ceil((length - tokens) / stride))
    scored = 0
    for number in range(later + 1):
        start = number * stride
        end = min(start + tokens, length)
        yield start, scored, end
        scored = end


def heldout_documents(
    demonstrations: Sequence[TokenizedDemonstration], tokenizer: PreTrainedTokenizerBase, unnamed: str
) -> dict[str, list[Document]]:
    """Held-out demonstrations as documents by the dataset of the mixture that they are of.

    Args:
        demonstrations: The demonstrations.
        tokenizer: Their tokenizer.
        unnamed: The name where there is no mixture.
    """
    documents: dict[str, list[Document]] = {}
    for demonstration in demonstrations:
        document = demonstration_document(demonstration, tokenizer)
        documents.setdefault(demonstration.dataset or unnamed, []).append(document)
    return documents
