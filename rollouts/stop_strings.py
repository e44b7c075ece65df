"""What ends a response besides its end-of-sequence tokens."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Ends a response with the token by which one of these strings is complete in its text."""

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.strings, self.tokenizer = tuple(strings), tokenizer
        # A token has a byte at least; one of which only a part belongs to the string may stand before it.
        self.window = max((len(string.encode()) for string in strings), default=0) + 1

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether the last of these tokens ends the response."""
        if not self.strings:
            return False
        text = self.tokenizer.decode(list(tokens[-self.window :]))
        return any(string in text for string in self.strings)
