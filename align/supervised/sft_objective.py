"""The objective of supervised fine-tuning: the likelihood of demonstrations."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align.data.examples import TokenizedDemonstration, pack_demonstrations
from align.supervised.trainer import Objective
from policies.batching import Batch
from policies.logprobs import token_logprobs
from policies.trunk import Trunk

SFT_ROLE = "reference"
"""The role of the SFT model in all later stages."""


class Likelihood(Objective):
    """Negative log-likelihood of the trained turns, in nats per trained token of the whole batch."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(
        self, ids: Tensor, lengths: Sequence[int], predictors: Tensor, labels: Tensor, num_items_in_batch: Tensor
    ) -> dict[str, Tensor]:
        """Compute this microbatch's part of the batch's loss.

        Args:
            ids: `[N]` int64, tokens of the packed sequences, see `policies.batching.Batch`.
            lengths: B numbers, tokens of each sequence.
            predictors: `[P]` int64, index into `ids` of the token that predicts each trained token.
            labels: `[P]` int64, the trained tokens.
            num_items_in_batch: Number of trained tokens in the whole batch.

        Returns:
            The scalar `loss`.
        """
        hidden = self.trunk.hidden_packed(ids, lengths, SFT_ROLE)  # [N, H]
        lm_head = partial(self.trunk.head, role=SFT_ROLE)
        logprobs = token_logprobs(hidden[predictors], labels, lm_head, temperature=1.0)  # [P]
        return {"loss": -logprobs.sum() / num_items_in_batch}


@torch.no_grad()
def heldout_loss(objective: Likelihood, demonstrations: Sequence[TokenizedDemonstration]) -> float:
    """Mean negative log-likelihood over all trained tokens, in nats."""
    device = objective.trunk.causal.device
    one = torch.ones((), device=device)
    total = 0.0
    lengths = [demonstration.length for demonstration in demonstrations]
    for indices in objective.trunk.microbatches(lengths):
        batch = pack_demonstrations([demonstrations[i] for i in indices]).to(device)
        total += float(objective(**_inputs(batch), num_items_in_batch=one)["loss"])
    return total / sum(demonstration.trained_tokens for demonstration in demonstrations)


def collate_demonstrations(demonstrations: Sequence[TokenizedDemonstration]) -> dict[str, Any]:
    """The arguments of `Likelihood` for a microbatch, but for `num_items_in_batch`."""
    return _inputs(pack_demonstrations(demonstrations))


def _inputs(batch: Batch) -> dict[str, Any]:
    return {
        "ids": batch.ids,
        "lengths": batch.lengths,
        "predictors": batch.predictors,
        "labels": batch.response_ids,
    }
