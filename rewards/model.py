"""The reward model: an adapter and scalar heads on the trunk."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from policies.batching import Batch, collate
from policies.errors import UserError
from policies.files.adapters import load_head, save_head
from policies.files.safe_reading import check_names_and_shapes, read_tensors
from policies.heads import ScalarHead
from policies.trunk import Trunk

REWARD_ROLE = "reward"
ATTRIBUTES = "attributes.safetensors"


def role_of(member: int) -> str:
    """The role of a member of an ensemble; the first, or only, one is `reward`."""
    return REWARD_ROLE if member == 0 else f"{REWARD_ROLE}_{member}"


def member_folder(folder: str | Path, member: int) -> Path:
    """Where a member of an ensemble is: the first, or only, one in the reward's folder itself."""
    return Path(folder) if member == 0 else Path(folder) / f"member-{member}"


def members_in(folder: str | Path) -> int:
    """How many members a reward's folder holds."""
    return next(member for member in count(1) if not member_folder(folder, member).is_dir())


class RewardModel(nn.Module):
    """Scores a response by the hidden state of its last token under the adapter of its role.

    A head for each attribute; the whole score is their weighted sum.
    """

    def __init__(
        self,
        trunk: Trunk,
        heads: Sequence[ScalarHead],
        weights: Mapping[str, float] | None = None,
        role: str = REWARD_ROLE,
    ) -> None:
        """weights: of the attributes by name, one for each head; without it the one head gives the whole score."""
        super().__init__()
        self.trunk, self.role = trunk, role
        self.heads = nn.ModuleList(heads)
        self.weights = dict(weights or {"": 1.0})
        if len(self.heads) != len(self.weights):
            raise ValueError(f"{len(self.heads)} heads for {len(self.weights)} attributes")

    def forward(self, batch: Batch) -> Tensor:
        """Scores by attribute `[B, A]` float32 of the rows of a batch."""
        return self.scores_packed(batch.ids, batch.lengths, batch.last)

    def scores_packed(self, ids: Tensor, rows: Tensor, last: Tensor) -> Tensor:
        """Scores by attribute `[B, A]`; arguments: of a `Batch`."""
        return self._scores(self.trunk.hidden_packed(ids, rows, self.role)[last])

    def scores_shared_prompts(self, ids: Tensor, positions: Tensor, seen: Tensor, last: Tensor) -> Tensor:
        """Scores by attribute `[R, A]` of all responses; arguments: of `SharedPromptBatch`."""
        return self._scores(self.trunk.hidden_shared_prompts(ids, positions, seen, self.role).flatten(0, 1)[last])

    def _scores(self, states: Tensor) -> Tensor:
        return torch.stack([head(states) for head in self.heads], dim=-1)

    @property
    def whole(self) -> ScalarHead:
        """A head that gives the weighted sum of the attributes at once."""
        head = ScalarHead.zeros(self.trunk.width)
        for part, weight in zip(self.heads, self.weights.values(), strict=True):
            for own, added in zip(head.parameters(), part.parameters(), strict=True):
                own.data += weight * added.detach().cpu()
        return head

    @torch.no_grad()
    def attribute_scores(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], tokens: int
    ) -> Tensor:
        """Scores by attribute `[N, A]` float32 of rows of tokens, at most `tokens` positions in one forward pass."""
        scores = torch.empty(len(prompts), len(self.heads))
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        for rows in self.trunk.microbatches(lengths, tokens):
            batch = collate([prompts[i] for i in rows], [responses[i] for i in rows])
            scores[rows] = self(batch.to(self.trunk.causal.device)).cpu()
        return scores

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], tokens: int) -> Tensor:
        """Whole scores `[N]` float32 of rows of tokens."""
        return self.attribute_scores(prompts, responses, tokens) @ torch.tensor([*self.weights.values()])

    def save(self, folder: Path, mean: float = 0.0, std: float = 1.0) -> None:
        """Write adapter and head in PEFT layout. The head that is written gives (score - mean) / deviation.

        With named attributes their own heads, as they are, are in a file beside it.
        """
        self.trunk.save(self.role, folder)
        head = self.whole
        head.fold(mean, std)
        save_head(folder, head.state_dict())
        if self.weights.keys() != {""}:
            heads = zip(self.weights, self.heads, strict=True)
            tensors = {f"{name}.{k}": t.cpu() for name, head in heads for k, t in head.state_dict().items()}
            save_file(tensors, folder / ATTRIBUTES)


def read_heads(folder: str | Path, weights: Mapping[str, float]) -> list[dict[str, Tensor]]:
    """The weights of the heads that a folder holds: the whole score's, or of the attributes that are named.

    Raises UserError where the folder does not have them.
    """
    if weights.keys() == {""}:
        return [load_head(folder)]
    path = Path(folder) / ATTRIBUTES
    if not path.is_file():
        raise UserError(f"reward.attributes: {folder} has no {ATTRIBUTES}; it was trained without named attributes")
    tensors = read_tensors(path)
    known = sorted({name.rpartition(".")[0] for name in tensors})
    for name in weights:
        if name not in known:
            raise UserError(f"reward.attributes: {folder} has no attribute {name}; it has {', '.join(known)}")
    if odd := [f"{name}.{part}" for name in weights for part in ("weight", "bias") if f"{name}.{part}" not in tensors]:
        raise UserError(f"{path} is damaged: it has no {odd[0]}")
    return [{part: tensors[f"{name}.{part}"] for part in ("weight", "bias")} for name in weights]


def load_heads(heads: Iterable[nn.Module], weights: Sequence[Mapping[str, Tensor]], folder: str | Path) -> None:
    """Give heads the weights that were read from a folder. Raises UserError where they are of another width."""
    for head, own in zip(heads, weights, strict=True):
        width = sum(p.numel() for p in head.parameters()) - 1
        if own.keys() >= {"weight"} and own["weight"].dim() == 1 and len(own["weight"]) != width:
            made = f"{len(own['weight'])} wide, this one is {width}"
            raise UserError(f"the head in {folder} was made for another base: hidden states {made}")
        check_names_and_shapes(own, head.state_dict(), f"the head in {folder}")
        head.load_state_dict(dict(own))
