"""Stage one: supervised fine-tuning on demonstrations."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align.data.datasets import Example
from align.stages.context import Job
from align.supervised.fit import fit
from align.supervised.trainer import Objective
from policies.batching import collate
from policies.files.adapters import load_adapter
from policies.logprobs import token_logprobs
from policies.trunk import Trunk

ROLE = "reference"
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
        states = self.trunk.hidden_of_rows(ids, rows, ROLE)
        logprobs = token_logprobs(states[before], labels, partial(self.trunk.head, role=ROLE), temperature=1.0)
        return {"loss": -logprobs.sum() / num_items_in_batch}


def run_sft(job: Job) -> None:
    """Train the adapter `reference` on the demonstrations, or adopt the one that is given; write it to `sft/`."""
    settings = job.experiment.sft
    started = time.perf_counter()
    trunk = job.new_trunk("sft")
    facts: dict[str, Any] = {}
    if settings.adapter:
        trunk.write_adapter(ROLE, load_adapter(settings.adapter, job.experiment.policy))
        facts["adapter"] = settings.adapter
    else:
        trunk.start_training(ROLE)
        trunk.train_only(ROLE)
        objective = Likelihood(trunk)
        fitted = fit(
            objective,
            job.inputs.examples,
            _tensors,
            settings,
            job.fit_context("sft"),
            metrics="sft",
            heldout=partial(heldout_loss, objective, job.inputs.examples_heldout),
            passes=trunk.passes,
            lora_plus=job.experiment.policy.lora_plus,
        )
        facts |= asdict(fitted) | {"skipped_rows": len(job.inputs.skipped.get("demonstrations", []))}
    with job.new_product(job.run.sft, facts, started) as folder:
        trunk.save(ROLE, folder)


@torch.no_grad()
def heldout_loss(objective: Likelihood, examples: Sequence[Example]) -> float:
    """Mean negative log-likelihood of all response tokens, in nats."""
    device, total = objective.trunk.causal.device, 0.0
    one = torch.ones((), device=device)
    for group in objective.trunk.passes([e.length for e in examples]):
        batch = {name: tensor.to(device) for name, tensor in _tensors([examples[i] for i in group]).items()}
        total += float(objective(**batch, num_items_in_batch=one)["loss"])
    return total / sum(len(e.response_ids) for e in examples)


def _tensors(examples: list[Example]) -> dict[str, Tensor]:
    batch = collate([e.prompt_ids for e in examples], [e.response_ids for e in examples])
    return {"ids": batch.ids, "rows": batch.rows, "before": batch.before, "labels": batch.tokens}
