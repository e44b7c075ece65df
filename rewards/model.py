"""The reward model: an adapter and a scalar head on the trunk."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from policies.adapters import save_head
from policies.batching import Batch, buckets, collate
from policies.errors import UserError
from policies.heads import ScalarHead
from policies.trunk import Trunk

ROLE = "reward"


class RewardModel(nn.Module):
    """Scores a response by the hidden state of its last token under the trunk's `reward` adapter."""

    def __init__(self, trunk: Trunk, head: ScalarHead) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, batch: Batch) -> Tensor:
        """Scores `[B]` float32 of the rows of a batch."""
        return self.scores_at(batch.ids, batch.last)

    def scores_at(self, ids: Tensor, last: Tensor) -> Tensor:
        """Scores `[B]` of rows `[B, T]` at their last tokens, indices into the flattened rows."""
        return self.head(self.trunk.hidden(ids, ROLE).flatten(0, 1)[last])

    def scores_of_branches(self, ids: Tensor, positions: Tensor, seen: Tensor, last: Tensor) -> Tensor:
        """Scores `[sides · B]` of `Branches`."""
        return self.head(self.trunk.hidden_of_branches(ids, positions, seen, ROLE).flatten(0, 1)[last])

    def load_head(self, weights: Mapping[str, Tensor], folder: str | Path) -> None:
        """Take the head that was read from a folder. Raises UserError where it is of another width."""
        if weights["weight"].shape != self.head.weight.shape:
            made = f"{len(weights['weight'])} wide, this one is {self.trunk.width}"
            raise UserError(f"the head in {folder} was made for another base: hidden states {made}")
        self.head.load_state_dict(dict(weights))

    @torch.no_grad()
    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], tokens: int) -> Tensor:
        """Scores `[N]` float32 of rows of tokens, at most `tokens` positions in one forward pass."""
        scores = torch.empty(len(prompts))
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        for rows in buckets(lengths, tokens):
            batch = collate([prompts[i] for i in rows], [responses[i] for i in rows])
            scores[rows] = self(batch.to(self.trunk.causal.device)).cpu()
        return scores

    def save(self, folder: Path) -> None:
        """Write adapter and head in PEFT layout."""
        self.trunk.save(ROLE, folder)
        save_head(folder, self.head.state_dict())
