"""Stop strings: text that ends a response, besides the end-of-sequence tokens."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Ends a response with the token that completes one of these strings in its text."""

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.strings = tuple(strings)
        self.tokenizer = tokenizer
        # Each token has at least one byte, and the first may hold only the beginning of the string at its end.
        self.window = max((len(string.encode()) for string in strings), default=0) + 1

    def __call__(self, tokens: Sequence[int], start: int = 0) -> bool:
        """Whether the last of these tokens ends the response; those before `start` cannot belong to a stop string."""
        if not self.strings:
            return False
        text = self.tokenizer.decode(list(tokens[max(start, len(tokens) - self.window) :]))
        return any(string in text for string in self.strings)
