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
"""The role of the SFT model in all later stages."""


class Likelihood(Objective):
    """Negative log-likelihood of the responses, in nats per response token of the whole batch."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(
        self, ids: Tensor, lengths: Tensor, predictors: Tensor, labels: Tensor, num_items_in_batch: Tensor
    ) -> dict[str, Tensor]:
        """Compute this microbatch's part of the batch's loss.

        Args:
            ids: `[N]` int64, tokens of the packed sequences, see `policies.batching.Batch`.
            lengths: `[B]` int64, tokens of each sequence.
            predictors: `[P]` int64, index into `ids` of the token that predicts each response token.
            labels: `[P]` int64, the response tokens.
            num_items_in_batch: Number of response tokens in the whole batch.

        Returns:
            The scalar `loss`.
        """
        hidden = self.trunk.hidden_packed(ids, lengths, SFT_ROLE)  # [N, H]
        lm_head = partial(self.trunk.head, role=SFT_ROLE)
        logprobs = token_logprobs(hidden[predictors], labels, lm_head, temperature=1.0)  # [P]
        return {"loss": -logprobs.sum() / num_items_in_batch}


@torch.no_grad()
def heldout_loss(objective: Likelihood, demonstrations: Sequence[TokenizedDemonstration]) -> float:
    """Mean negative log-likelihood over all response tokens, in nats."""
    device = objective.trunk.causal.device
    one = torch.ones((), device=device)
    total = 0.0
    lengths = [demonstration.length for demonstration in demonstrations]
    for indices in objective.trunk.microbatches(lengths):
        batch = collate_demonstrations([demonstrations[i] for i in indices])
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        total += float(objective(**inputs, num_items_in_batch=one)["loss"])
    return total / sum(len(demonstration.response_ids) for demonstration in demonstrations)


def collate_demonstrations(demonstrations: Sequence[TokenizedDemonstration]) -> dict[str, Tensor]:
    """The arguments of `Likelihood` for a microbatch, but for `num_items_in_batch`."""
    prompts = [demonstration.prompt_ids for demonstration in demonstrations]
    responses = [demonstration.response_ids for demonstration in demonstrations]
    batch = collate(prompts, responses)
    return {
        "ids": batch.ids,
        "lengths": batch.lengths,
        "predictors": batch.predictors,
        "labels": batch.response_ids,
    }
