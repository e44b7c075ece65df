"""Rows of true length into padded batches, with as little padding as a token budget allows.

Rows are padded on the right and attention is causal, so no real position ever sees padding: neither an attention mask
nor position ids are needed, and every model family computes what it computes for the row alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B rows of prompt and response. P is the number of response tokens of all rows.

    ids: `[B, T]` int64; what stands behind a row's end is the pad id and is never looked at.
    before: `[P]` int64, index into the flattened `[B·T]` of the position that predicts each response token.
    tokens: `[P]` int64, the response tokens, row after row.
    last: `[B]` int64, index into the flattened `[B·T]` of each row's last token.
    lengths: response tokens of each row.
    """

    ids: Tensor
    before: Tensor
    tokens: Tensor
    last: Tensor
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            self.ids.to(device), self.before.to(device), self.tokens.to(device), self.last.to(device), self.lengths
        )

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """A `[P]` tensor as one tensor a row."""
        return torch.split(flat, list(self.lengths))


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad: int = 0) -> Batch:
    """Rows of tokens to a batch. Every prompt has at least one token."""
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    starts = range(0, len(rows) * width, width)
    before = [
        range(start + len(prompt) - 1, start + len(row) - 1)
        for start, prompt, row in zip(starts, prompts, rows, strict=True)
    ]
    return Batch(
        ids=torch.tensor([row + [pad] * (width - len(row)) for row in rows], dtype=torch.long),
        before=torch.tensor(list(chain.from_iterable(before)), dtype=torch.long),
        tokens=torch.tensor(list(chain.from_iterable(responses)), dtype=torch.long),
        last=torch.tensor([start + len(row) - 1 for start, row in zip(starts, rows, strict=True)], dtype=torch.long),
        lengths=tuple(map(len, responses)),
    )


@dataclass(frozen=True)
class Branches:
    """B prompts, each with its responses behind it, N in all; responses see their prompt, and not each other.

    ids: `[B, T]` int64. positions: `[B, T]` int64; a response's go on from its prompt's. seen: `[B, 1, T, T]` bool,
    which keys a query attends to. last: `[N]` int64, index into the flattened `[B·T]` of each response's last token,
    prompt after prompt.
    """

    ids: Tensor
    positions: Tensor
    seen: Tensor
    last: Tensor


def collate_branches(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]], pad: int = 0
) -> Branches:
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
    return Branches(ids, positions, seen, torch.tensor(last))


def buckets(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of rows, grouped by length so that no group pads to more than `tokens` positions.

    A row longer than `tokens` makes a group of its own. Groups come in order of length.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and lengths[index] * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def shares(count: int, parts: int) -> Iterator[range]:
    """`count` things in `parts` runs whose sizes differ by one at most."""
    sizes = [count // parts + (part < count % parts) for part in range(parts)]
    ends = list(accumulate(sizes))
    return (range(end - size, end) for size, end in zip(sizes, ends, strict=True))
