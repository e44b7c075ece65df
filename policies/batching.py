"""Rows of true length into batches, and which rows go together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B rows of prompt and response, one after another: N tokens, of which P are of responses.

    ids: `[N]` int64.
    lengths: `[B]` int64, tokens of each row.
    predictors: `[P]` int64, index into `ids` of the token that predicts each response token.
    response_ids: `[P]` int64, the response tokens, row after row.
    last: `[B]` int64, index into `ids` of each row's last token.
    response_lengths: response tokens of each row.
    """

    ids: Tensor
    lengths: Tensor
    predictors: Tensor
    response_ids: Tensor
    last: Tensor
    response_lengths: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        ids, lengths, predictors, response_ids, last = (
            part.to(device) for part in (self.ids, self.lengths, self.predictors, self.response_ids, self.last)
        )
        return Batch(ids, lengths, predictors, response_ids, last, self.response_lengths)

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """A `[P]` tensor as one tensor a row."""
        return torch.split(flat, list(self.response_lengths))


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Batch:
    """Rows of tokens to a batch. Every prompt has at least one token."""
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    ends = list(accumulate(map(len, rows)))
    before = [range(end - len(response) - 1, end - 1) for end, response in zip(ends, responses, strict=True)]
    return Batch(
        ids=torch.tensor(list(chain.from_iterable(rows)), dtype=torch.long),
        lengths=torch.tensor([len(row) for row in rows], dtype=torch.long),
        predictors=torch.tensor(list(chain.from_iterable(before)), dtype=torch.long),
        response_ids=torch.tensor(list(chain.from_iterable(responses)), dtype=torch.long),
        last=torch.tensor(ends, dtype=torch.long) - 1,
        response_lengths=tuple(map(len, responses)),
    )


@dataclass(frozen=True)
class SharedPromptBatch:
    """B prompts, each with its responses behind it, N in all; responses see their prompt, and not each other.

    ids: `[B, T]` int64. positions: `[B, T]` int64; a response's go on from its prompt's. seen: `[B, 1, T, T]` bool,
    which keys a query attends to. last: `[N]` int64, index into the flattened `[B·T]` of each response's last token,
    prompt after prompt.
    """

    ids: Tensor
    positions: Tensor
    seen: Tensor
    last: Tensor


def collate_shared_prompts(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]], pad: int = 0
) -> SharedPromptBatch:
    """Rows of a prompt and its responses, in which the prompt is computed once."""
    rows = [[prompt, *behind] for prompt, behind in zip(prompts, responses, strict=True)]
    width = max(sum(map(len, row)) for row in rows)
    ids, positions, parts = (torch.full((len(rows), width), start) for start in (pad, 0, -1))
    last: list[int] = []
    for index, row in enumerate(rows):
        end = 0
        for part, tokens in enumerate(row):
            place = slice(end, end + len(tokens))
            ids[index, place] = torch.tensor(tokens, dtype=torch.long)
            positions[index, place] = torch.arange(len(tokens)) + (len(row[0]) if part else 0)
            parts[index, place] = part
            end += len(tokens)
            if part:
                last.append(index * width + end - 1)
    same = (parts.unsqueeze(1) == parts.unsqueeze(2)) | (parts.unsqueeze(1) == 0)
    seen = (same & torch.ones(width, width).tril().bool()).unsqueeze(1)
    return SharedPromptBatch(ids, positions, seen, torch.tensor(last))


def length_buckets(lengths: Sequence[int], tokens: int, padded: bool = True) -> list[list[int]]:
    """Indices of rows, grouped by length so that no group has more than `tokens` positions.

    padded: whether those count that pad a group's rows to the length of its longest. A row longer than `tokens` makes a
    group of its own. Groups come in order of length.
    """
    groups: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        fits = lengths[index] * (len(groups[-1]) + 1) <= tokens if padded and groups else lengths[index] <= room
        if groups and fits:
            groups[-1].append(index)
            room -= lengths[index]
        else:
            groups.append([index])
            room = tokens - lengths[index]
    return groups


def shares(count: int, parts: int) -> Iterator[range]:
    """`count` things in `parts` runs whose sizes differ by one at most."""
    sizes = [count // parts + (part < count % parts) for part in range(parts)]
    ends = list(accumulate(sizes))
    return (range(end - size, end) for size, end in zip(sizes, ends, strict=True))
