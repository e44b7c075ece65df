"""Stage one: supervised fine-tuning on demonstrations."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align.data.datasets import TokenizedDemonstration
from align.stages.context import StageContext
from align.supervised.fit import fit
from align.supervised.trainer import Objective
from policies.batching import collate
from policies.files.adapters import load_adapter
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


def run_sft(context: StageContext) -> None:
    """Train the adapter `reference` on the demonstrations, or adopt the one that is given; write it to `sft/`."""
    settings = context.experiment.sft
    started = time.perf_counter()
    trunk = context.new_trunk("sft")
    facts: dict[str, Any] = {}
    if settings.adapter:
        trunk.write_adapter(SFT_ROLE, load_adapter(settings.adapter, context.experiment.policy))
        facts["adapter"] = settings.adapter
    else:
        trunk.start_training(SFT_ROLE)
        trunk.train_only(SFT_ROLE)
        objective = Likelihood(trunk)
        fitted = fit(
            objective,
            context.datasets.demonstrations,
            _tensors,
            settings,
            context.fit_context("sft"),
            metrics="sft",
            heldout=partial(heldout_loss, objective, context.datasets.demonstrations_heldout),
            microbatches=trunk.microbatches,
            lora_plus=context.experiment.policy.lora_plus,
        )
        facts |= asdict(fitted) | {"skipped_rows": len(context.datasets.skipped.get("demonstrations", []))}
    with context.new_product(context.run.sft, facts, started) as folder:
        trunk.save(SFT_ROLE, folder)


@torch.no_grad()
def heldout_loss(objective: Likelihood, examples: Sequence[TokenizedDemonstration]) -> float:
    """Mean negative log-likelihood of all response tokens, in nats."""
    device, total = objective.trunk.causal.device, 0.0
    one = torch.ones((), device=device)
    for group in objective.trunk.microbatches([e.length for e in examples]):
        batch = {name: tensor.to(device) for name, tensor in _tensors([examples[i] for i in group]).items()}
        total += float(objective(**batch, num_items_in_batch=one)["loss"])
    return total / sum(len(e.response_ids) for e in examples)


def _tensors(examples: list[TokenizedDemonstration]) -> dict[str, Tensor]:
    batch = collate([e.prompt_ids for e in examples], [e.response_ids for e in examples])
    return {"ids": batch.ids, "rows": batch.lengths, "before": batch.predictors, "labels": batch.response_ids}
