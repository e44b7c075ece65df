"""The reward model: an adapter and scalar heads on the shared base model."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from policies.batching import Batch, collate
from policies.errors import UserError
from policies.files.adapters import load_head, save_head
from policies.files.safe_reading import check_names_and_shapes, read_tensors
from policies.files.writing import save_tensors
from policies.heads import ScalarHead
from policies.trunk import Trunk

REWARD_ROLE = "reward"
ATTRIBUTES = "attributes.safetensors"
"""The file with the heads of named attributes, in a reward model's folder."""


def role_of(member: int) -> str:
    """The role of a member of an ensemble; that of the first, or only, member is `reward`."""
    return REWARD_ROLE if member == 0 else f"{REWARD_ROLE}_{member}"


def member_folder(folder: str | Path, member: int) -> Path:
    """The folder of a member of an ensemble; that of the first, or only, member is the reward's folder itself."""
    return Path(folder) if member == 0 else Path(folder) / f"member-{member}"


def members_in(folder: str | Path) -> int:
    """Number of members in a reward's folder."""
    return next(member for member in count(1) if not member_folder(folder, member).is_dir())


class RewardModel(nn.Module):
    """Scores a response by the hidden state of its last token under the adapter of its role.

    It has a head for each attribute; the overall score is their weighted sum. `A` is the number of attributes, 1 for a
    model without named ones.
    """

    def __init__(
        self,
        trunk: Trunk,
        heads: Sequence[ScalarHead],
        weights: Mapping[str, float] | None = None,
        role: str = REWARD_ROLE,
    ) -> None:
        """Assemble a model.

        Args:
            trunk: The base model, with an adapter for the role.
            heads: One for each attribute.
            weights: The weights of the attributes in the overall score, by name; None: a single head gives the overall
                score.
            role: The role whose adapter is used.
        """
        super().__init__()
        self.trunk = trunk
        self.role = role
        self.heads = nn.ModuleList(heads)
        self.weights = dict(weights or {"": 1.0})
        if len(self.heads) != len(self.weights):
            raise ValueError(f"{len(self.heads)} heads for {len(self.weights)} attributes")

    def forward(self, batch: Batch) -> Tensor:
        """Scores by attribute `[B, A]` float32 of the sequences of a batch."""
        return self.scores_packed(batch.ids, batch.lengths, batch.last)

    def scores_packed(self, ids: Tensor, lengths: Sequence[int], last: Tensor) -> Tensor:
        """Scores by attribute `[B, A]` float32 of packed sequences; arguments as in `Batch`.

        At other tokens than the last ones, of any number, it gives the scores there: those of a process reward model.
        """
        return self._scores(self.trunk.hidden_packed(ids, lengths, self.role)[last])

    def scores_shared_prompts(self, ids: Tensor, positions: Tensor, attention_mask: Tensor, last: Tensor) -> Tensor:
        """Scores by attribute `[R, A]` float32 of all R responses; arguments as in `SharedPromptBatch`."""
        hidden = self.trunk.hidden_shared_prompts(ids, positions, attention_mask, self.role)
        return self._scores(hidden.flatten(0, 1)[last])

    def _scores(self, hidden: Tensor) -> Tensor:
        """Scores `[B, A]` of hidden states `[B, H]`."""
        return torch.stack([head(hidden) for head in self.heads], dim=-1)

    @property
    def combined_head(self) -> ScalarHead:
        """A head on the CPU that computes the overall score: the weighted sum of the attributes' heads."""
        combined = ScalarHead.zeros(self.trunk.width)
        for head, weight in zip(self.heads, self.weights.values(), strict=True):
            for total, parameter in zip(combined.parameters(), head.parameters(), strict=True):
                total.data += weight * parameter.detach().cpu()
        return combined

    @torch.no_grad()
    def attribute_scores(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], tokens: int
    ) -> Tensor:
        """Score responses without gradients.

        Args:
            prompts: Token ids `[N]`.
            responses: Token ids `[N]`.
            tokens: Largest number of tokens in a microbatch; one longer sequence is a microbatch by itself.

        Returns:
            Scores by attribute `[N, A]` float32, on the CPU.
        """
        scores = torch.empty(len(prompts), len(self.heads))
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
        for members in self.trunk.microbatches(lengths, tokens):
            member_prompts = [prompts[i] for i in members]
            member_responses = [responses[i] for i in members]
            batch = collate(member_prompts, member_responses)
            scores[members] = self(batch.to(self.trunk.causal.device)).cpu()
        return scores

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], tokens: int) -> Tensor:
        """Overall scores `[N]` float32 of responses; arguments as of `attribute_scores`."""
        return self.attribute_scores(prompts, responses, tokens) @ torch.tensor([*self.weights.values()])

    def save(self, folder: Path, mean: float = 0.0, std: float = 1.0) -> None:
        """Write adapter and head in PEFT layout, and the unchanged heads of named attributes to a file beside them.

        Args:
            folder: The folder to write to; it is created if it does not exist.
            mean: The mean of the overall scores on SFT responses.
            std: Their standard deviation; the saved head computes (score - mean) / std.
        """
        self.trunk.save(self.role, folder)
        head = self.combined_head
        head.fold(mean, std)
        save_head(folder, head.state_dict())
        if self.weights.keys() != {""}:
            tensors: dict[str, Tensor] = {}
            for name, attribute_head in zip(self.weights, self.heads, strict=True):
                for part, tensor in attribute_head.state_dict().items():
                    tensors[f"{name}.{part}"] = tensor.cpu()
            save_tensors(tensors, folder / ATTRIBUTES)


def read_heads(folder: str | Path, weights: Mapping[str, float]) -> list[dict[str, Tensor]]:
    """Read the heads of a saved reward model.

    Args:
        folder: The folder of the reward model.
        weights: `{"": 1.0}` for the head of the overall score; otherwise the attributes whose heads to read, by name.

    Returns:
        For each head its tensors `weight` `[H]` and `bias` `[1]`.

    Raises:
        UserError: The folder does not contain these heads, or the file is damaged.
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
    return [_attribute_head(tensors, name, path) for name in weights]


def _attribute_head(tensors: Mapping[str, Tensor], name: str, path: Path) -> dict[str, Tensor]:
    head: dict[str, Tensor] = {}
    for part in ("weight", "bias"):
        if f"{name}.{part}" not in tensors:
            raise UserError(f"{path} is damaged: it has no {name}.{part}")
        head[part] = tensors[f"{name}.{part}"]
    return head


def load_heads(heads: Iterable[nn.Module], weights: Sequence[Mapping[str, Tensor]], folder: str | Path) -> None:
    """Load the weights that `read_heads` has read into heads.

    Args:
        heads: Scalar heads.
        weights: The tensors of each head by name, as `read_heads` returns them.
        folder: The folder that they were read from, for messages.

    Raises:
        UserError: The weights are of another hidden size, or have other names or shapes.
    """
    for head, tensors in zip(heads, weights, strict=True):
        hidden_size = sum(parameter.numel() for parameter in head.parameters()) - 1  # without the bias
        weight = tensors.get("weight")
        if weight is not None and weight.dim() == 1 and len(weight) != hidden_size:
            sizes = f"its hidden size is {len(weight)}, that of this base model is {hidden_size}"
            raise UserError(f"the head in {folder} belongs to another base model: {sizes}")
        check_names_and_shapes(tensors, head.state_dict(), f"the head in {folder}")
        head.load_state_dict(dict(tensors))
