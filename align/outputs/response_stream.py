"""The text of one response while it is generated."""

from collections.abc import Generator, Iterator

from transformers import PreTrainedTokenizerBase

from policies.text.incremental import IncrementalText
from rollouts.trajectory import Trajectory


class ResponseStream:
    """The pieces of a response's text, in order. A piece is generated when it is asked for.

    Joined, they are the text of the complete response. They never contain a part of a character.

    Attributes:
        truncated: Whether the response reached the limit on its tokens before it ended; known after the last piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Generator[int, None, Trajectory]) -> None:
        """tokenizer: the model's. tokens: those of the response, as an engine streams them."""
        self.truncated = False
        self._pieces = self._decode(IncrementalText(tokenizer), tokens)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _decode(self, text: IncrementalText, tokens: Generator[int, None, Trajectory]) -> Iterator[str]:
        for token in self._tokens(tokens):
            if piece := text.add(token):
                yield piece
        if rest := text.finish():
            yield rest

    def _tokens(self, tokens: Generator[int, None, Trajectory]) -> Iterator[int]:
        trajectory = yield from tokens
        self.truncated = not trajectory.ended
