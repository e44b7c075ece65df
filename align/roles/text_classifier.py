"""The classifier or regression model of texts: an adapter and a linear head on the shared base model."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from align.data.labels import LabelSpace, read_space, space_record
from align.runtime.atomic_files import write_json
from policies.batching import Batch, collate
from policies.build import build_trunk
from policies.errors import UserError
from policies.files.adapters import load_adapter, load_head, save_head
from policies.files.safe_reading import check_names_and_shapes, read_object
from policies.heads import LinearHead
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import Trunk

CLASSIFIER_ROLE = "classifier"
LABELS = "labels.json"
"""The file with the label space, in a classifier's folder."""
KIND = "a classifier of align"


class TextClassifier(nn.Module):
    """Reads C outputs off the hidden state of a text's last token, under the adapter of the role `classifier`.

    Attributes:
        trunk: The base model, with an adapter for the role.
        head: The linear head.
        space: What the outputs mean: a logit for each class; or a number, in standard deviations from the mean of the
            training labels.
    """

    def __init__(self, trunk: Trunk, head: LinearHead, space: LabelSpace) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.space = space

    def forward(self, batch: Batch) -> Tensor:
        """Outputs `[B, C]` float32 of the texts of a batch."""
        outputs: Tensor = self.head(self.last_states(batch))
        return outputs

    def last_states(self, batch: Batch) -> Tensor:
        """Hidden states `[B, H]` of the last tokens of the texts of a batch, in the base's dtype."""
        return self.trunk.hidden_packed(batch.ids, batch.lengths, CLASSIFIER_ROLE)[batch.last]

    @torch.no_grad()
    def outputs(self, texts: Sequence[Sequence[int]], tokens: int | None = None) -> Tensor:
        """Compute outputs without gradients.

        Args:
            texts: Token ids of each text `[N]`.
            tokens: Largest number of tokens in a microbatch; None: what suits the device. One longer text is a
                microbatch by itself.

        Returns:
            `[N, C]` float32, on the CPU.
        """
        outputs = torch.empty(len(texts), self.space.outputs)
        for members in self.trunk.microbatches([len(text) for text in texts], tokens):
            batch = collate_texts([texts[i] for i in members]).to(self.trunk.causal.device)
            outputs[members] = self(batch).cpu()
        return outputs

    def save(self, folder: Path) -> None:
        """Write adapter, head and labels to a folder; it is created if it does not exist."""
        self.trunk.save(CLASSIFIER_ROLE, folder)
        save_head(folder, self.head.state_dict())
        write_json(folder / LABELS, space_record(self.space))


def collate_texts(texts: Sequence[Sequence[int]]) -> Batch:
    """Pack complete texts, given by their token ids, into a batch on the CPU."""
    return collate(texts, [[]] * len(texts))


def load_text_classifier(model: ModelSettings, policy: PolicySettings, folder: Path) -> TextClassifier:
    """Load what `TextClassifier.save` has written, bit for bit.

    Args:
        model: Settings of the base model.
        policy: Settings of the adapter.
        folder: The folder.

    Raises:
        UserError: A file is missing or damaged, or is of another base model.
    """
    if not (folder / LABELS).is_file():
        raise UserError(f"folder {folder} has no {LABELS}: it is not {KIND}")
    space = read_space(read_object(folder / LABELS), folder / LABELS)
    trunk = build_trunk(model, policy, (CLASSIFIER_ROLE,))
    trunk.write_adapter(CLASSIFIER_ROLE, load_adapter(folder, policy))
    head = LinearHead(trunk.width, space.outputs)
    weights = load_head(folder, KIND)
    check_names_and_shapes(weights, head.state_dict(), f"the head in {folder}")
    head.load_state_dict(weights)
    return TextClassifier(trunk, head.to(trunk.causal.device), space).eval()
