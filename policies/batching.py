"""Batches of sequences of different lengths, and which sequences share a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B packed sequences of prompt and response: N tokens, P of them of responses.

    Attributes:
        ids: `[N]` int64.
        lengths: Tokens of each sequence; on the host, where they are needed to lay out a forward pass.
        predictors: `[P]` int64, index into `ids` of the token that predicts each response token.
        response_ids: `[P]` int64, the response tokens, sequence by sequence.
        last: `[B]` int64, index into `ids` of each sequence's last token.
        response_lengths: Response tokens of each sequence.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    predictors: Tensor
    response_ids: Tensor
    last: Tensor
    response_lengths: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(
            ids=self.ids.to(device),
            lengths=self.lengths,
            predictors=self.predictors.to(device),
            response_ids=self.response_ids.to(device),
            last=self.last.to(device),
            response_lengths=self.response_lengths,
        )

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """A `[P]` tensor as one tensor per sequence."""
        return torch.split(flat, list(self.response_lengths))


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Batch:
    """Pack prompts, each followed by its response.

    Args:
        prompts: B lists of token ids; each has at least one.
        responses: B lists of token ids; they may be empty.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: There are more prompts than responses, or fewer.
    """
    sequences: list[list[int]] = []
    turns: list[list[tuple[int, int]]] = []
    for prompt, response in zip(prompts, responses, strict=True):
        sequences.append([*prompt, *response])
        turns.append([(len(prompt), len(prompt) + len(response))])
    return collate_turns(sequences, turns)


def collate_turns(sequences: Sequence[Sequence[int]], turns: Sequence[Sequence[tuple[int, int]]]) -> Batch:
    """Pack sequences in which one or more turns are responses.

    Args:
        sequences: B lists of token ids.
        turns: For each sequence, the first token of each turn, at least 1, and one past its last.

    Returns:
        The batch, on the CPU. Its response tokens are those of all turns.

    Raises:
        ValueError: There are more sequences than lists of turns, or fewer.
    """
    ids: list[int] = []
    lengths: list[int] = []
    predictors: list[int] = []
    ends: list[int] = []
    response_ids: list[int] = []
    response_lengths: list[int] = []
    for sequence, spans in zip(sequences, turns, strict=True):
        for start, end in spans:
            # Each response token is predicted by the token before it.
            predictors += range(len(ids) + start - 1, len(ids) + end - 1)
            response_ids += sequence[start:end]
        ids += sequence
        lengths.append(len(sequence))
        ends.append(len(ids))
        response_lengths.append(sum(end - start for start, end in spans))
    return Batch(
        ids=torch.tensor(ids, dtype=torch.long),
        lengths=tuple(lengths),
        predictors=torch.tensor(predictors, dtype=torch.long),
        response_ids=torch.tensor(response_ids, dtype=torch.long),
        last=torch.tensor(ends, dtype=torch.long) - 1,
        response_lengths=tuple(response_lengths),
    )


@dataclass(frozen=True)
class SharedPromptBatch:
    """B prompts, each followed by its responses, R in all. Responses attend to their prompt and not to each other.

    Attributes:
        ids: `[B, T]` int64, padded on the right.
        positions: `[B, T]` int64; those of each response continue its prompt's; 0 in padding.
        attention_mask: `[B, 1, T, T]` bool, True where a query attends to a key.
        last: `[R]` int64, index into flattened `[B·T]` of each response's last token, prompt by prompt.
    """

    ids: Tensor
    positions: Tensor
    attention_mask: Tensor
    last: Tensor

    def to(self, device: torch.device) -> "SharedPromptBatch":
        """The same batch on a device."""
        return SharedPromptBatch(
            self.ids.to(device), self.positions.to(device), self.attention_mask.to(device), self.last.to(device)
        )


PROMPT_PART = 0
"""Responses are parts 1, 2, … of their sequence; padding is part -1."""


def collate_shared_prompts(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]], pad: int = 0
) -> SharedPromptBatch:
    """Put all responses to a prompt after it in one sequence, so that the prompt is computed once.

    Args:
        prompts: B lists of token ids.
        responses: For each prompt, the token ids of each of its responses.
        pad: Token id of padding.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: There are more prompts than lists of responses, or fewer.
    """
    sequences = [[prompt, *following] for prompt, following in zip(prompts, responses, strict=True)]
    width = max(sum(map(len, parts)) for parts in sequences)
    shape = (len(sequences), width)
    ids = torch.full(shape, pad)  # [B, T]
    positions = torch.full(shape, 0)  # [B, T]
    part_ids = torch.full(shape, -1)  # [B, T]
    last: list[int] = []
    for index, parts in enumerate(sequences):
        end = 0
        for part, tokens in enumerate(parts):
            span = slice(end, end + len(tokens))
            first_position = 0 if part == PROMPT_PART else len(parts[PROMPT_PART])
            ids[index, span] = torch.tensor(tokens, dtype=torch.long)
            positions[index, span] = torch.arange(len(tokens)) + first_position
            part_ids[index, span] = part
            end += len(tokens)
            if part != PROMPT_PART:
                last.append(index * width + end - 1)
    queries = part_ids.unsqueeze(2)  # [B, T, 1]
    keys = part_ids.unsqueeze(1)  # [B, 1, T]
    causal = torch.ones(width, width).tril().bool()  # [T, T]
    mask = ((keys == queries) | (keys == PROMPT_PART)) & causal  # [B, T, T]
    return SharedPromptBatch(ids, positions, mask.unsqueeze(1), torch.tensor(last))


def length_buckets(lengths: Sequence[int], tokens: int, padded: bool = True) -> list[list[int]]:
    """Group sequences by length so that no group has more than `tokens` positions.

    Args:
        lengths: Tokens of each sequence.
        tokens: The most positions of a group. A longer sequence is a group of its own.
        padded: Count the padding of a group's sequences to the length of its longest.

    Returns:
        Indices of the sequences of each group, in order of length.
    """
    groups: list[list[int]] = []
    remaining = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        length = lengths[index]
        if padded and groups:
            fits = length * (len(groups[-1]) + 1) <= tokens
        else:
            fits = length <= remaining
        if groups and fits:
            groups[-1].append(index)
            remaining -= length
        else:
            groups.append([index])
            remaining = tokens - length
    return groups


def shares(count: int, parts: int) -> Iterator[range]:
    """Split `range(count)` into `parts` ranges whose sizes differ by one at most."""
    sizes = [count // parts + (part < count % parts) for part in range(parts)]
    return (range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True))
