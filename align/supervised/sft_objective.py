"""The objective of supervised fine-tuning: the likelihood of demonstrations."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from align.data.datasets import TokenizedDemonstration
from align.supervised.trainer import Objective
from policies.batching import collate
from policies.logprobs import token_logprobs
from policies.trunk import Trunk

SFT_ROLE = "reference"
"""What the SFT model is to all later stages."""


class Likelihood(Objective):
    """Negative log-likelihood of responses, in nats a response token of the whole batch."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(
        self, ids: Tensor, rows: Tensor, before: Tensor, labels: Tensor, num_items_in_batch: Tensor
    ) -> dict[str, Tensor]:
        """ids, rows, before, labels: `ids`, `rows`, `before` and `tokens` of a `Batch`."""
        states = self.trunk.hidden_packed(ids, rows, SFT_ROLE)
        logprobs = token_logprobs(states[before], labels, partial(self.trunk.head, role=SFT_ROLE), temperature=1.0)
        return {"loss": -logprobs.sum() / num_items_in_batch}


@torch.no_grad()
def heldout_loss(objective: Likelihood, examples: Sequence[TokenizedDemonstration]) -> float:
    """Mean negative log-likelihood of all response tokens, in nats."""
    device, total = objective.trunk.causal.device, 0.0
    one = torch.ones((), device=device)
    for group in objective.trunk.microbatches([e.length for e in examples]):
        batch = {name: tensor.to(device) for name, tensor in tensors([examples[i] for i in group]).items()}
        total += float(objective(**batch, num_items_in_batch=one)["loss"])
    return total / sum(len(e.response_ids) for e in examples)


def tensors(examples: list[TokenizedDemonstration]) -> dict[str, Tensor]:
    batch = collate([e.prompt_ids for e in examples], [e.response_ids for e in examples])
    return {"ids": batch.ids, "rows": batch.lengths, "before": batch.predictors, "labels": batch.response_ids}
