"""Which token of a response completes a given character of its text."""

from bisect import bisect_left
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from policies.text.incremental import CertainText
from policies.text.tokenization import decode_response


class TextAlignment:
    """Aligns the text of a response with its T tokens.

    A token completes the first n characters of the text if they are the beginning of what the tokens up to it decode
    to, and of what the tokens up to any later one do, and if this does not hold of the token before it. Where the bytes
    of a character are split over several tokens, it is thus the last of them.

    Attributes:
        ids: The token ids.
        text: The text without special tokens, as `decode_response` gives it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
        self.ids = ids
        self.text = decode_response(tokenizer, ids)
        self._tokenizer = tokenizer
        self._certain_text = CertainText(tokenizer)
        self._certain_lengths: dict[int, int] = {}

    def completing_token(self, characters: int) -> int:
        """The index, from 0, of the token that completes the first `characters` characters.

        Decodes O(log T) prefixes, where the text does not consist of broken characters.

        Raises:
            ValueError: The text is not that long, or the number is less than 1.
        """
        if not 1 <= characters <= len(self.text):
            raise ValueError(f"characters is {characters}; the text has {len(self.text)}")
        token = bisect_left(range(len(self.ids)), characters, key=self._certain_up_to)
        while token > 0 and self._is_complete(token - 1, characters):
            token -= 1
        return token

    def _certain_up_to(self, token: int) -> int:
        """The number of characters that are certain once this token is known."""
        if token == len(self.ids) - 1:
            return len(self.text)
        for known in range(token, -1, -1):  # few, because most tokens leave nothing open
            if length := self._certain_length(known):
                return length
        return 0

    def _certain_length(self, token: int) -> int:
        if token not in self._certain_lengths:
            self._certain_lengths[token] = len(self._certain_text(self.ids[: token + 1]))
        return self._certain_lengths[token]

    def _is_complete(self, token: int, characters: int) -> bool:
        prefix = decode_response(self._tokenizer, self.ids[: token + 1])
        return prefix[:characters] == self.text[:characters]
