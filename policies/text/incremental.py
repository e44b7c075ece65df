"""The text of a response while its tokens are still coming."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from policies.text.tokenization import decode_response

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
"""A token of a tokenizer with byte fallback that stands for one byte."""

CLEANED_UP = 8
"""Characters at the end that the cleaning of spaces by transformers may still change: its longest pattern is " n't"."""


class CertainText:
    """Finds the part of a text that no later token can change.

    What may still change is half of a character, bytes that are decoded together with those after them, and spaces that
    are cleaned up.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._margin = CLEANED_UP if tokenizer.clean_up_tokenization_spaces else 0

    def __call__(self, ids: Sequence[int]) -> str:
        """The certain beginning of the text of these tokens, at least one; empty where the last one leaves it open."""
        name = self.tokenizer.convert_ids_to_tokens(ids[-1])
        has_no_text = name is None or ids[-1] in self._special_ids  # models may have more ids than the tokenizer
        if has_no_text or BYTE_TOKEN.fullmatch(name):
            return ""
        text = decode_response(self.tokenizer, ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return text[: max(len(text) - self._margin, 0)]


class IncrementalText:
    """Decodes tokens as they come, in pieces that never change earlier ones.

    Joined, the pieces are the text that `decode_response` gives for all tokens. A piece is held back while a later
    token could still change it, see `CertainText`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._certain_text = CertainText(tokenizer)
        self._given = 0
        """The number of characters in the pieces so far."""

    def add(self, token: int) -> str:
        """Add a token.

        Returns:
            The text that is certain now and was not before; often a word, sometimes nothing.
        """
        self.ids.append(token)
        return self._piece(self._certain_text(self.ids))

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        return self._piece(decode_response(self.tokenizer, self.ids))

    def _piece(self, text: str) -> str:
        piece = text[self._given :]
        self._given += len(piece)
        return piece
