"""Supervised fine-tuning on demonstrations."""

import time
from dataclasses import asdict
from functools import partial
from typing import Any

from align.stages.context import StageContext
from align.supervised.fit import FitTask, fit
from align.supervised.sft_objective import SFT_ROLE, Likelihood, collate_demonstrations, heldout_loss
from policies.files.adapters import load_adapter
from policies.trunk import Trunk


def run_sft(context: StageContext) -> None:
    """Train the adapter of role `reference` on the demonstrations, or adopt a ready-made one; write it to `sft/`."""
    started = time.perf_counter()
    trunk = context.new_trunk("sft")
    settings = context.experiment.sft
    ready_made = settings.adapter
    if ready_made:
        trunk.write_adapter(SFT_ROLE, load_adapter(ready_made, context.experiment.policy, settings.residual_base))
        facts: dict[str, Any] = {"adapter": ready_made}
    else:
        facts = _train(context, trunk)
    with context.new_product(context.run.sft, facts, started) as folder:
        trunk.save(SFT_ROLE, folder)


def _train(context: StageContext, trunk: Trunk) -> dict[str, Any]:
    """Train the adapter. Returns the facts of `stage.json`."""
    trunk.start_training(SFT_ROLE)
    trunk.train_only(SFT_ROLE)
    objective = Likelihood(trunk)
    task = FitTask(
        objective=objective,
        examples=context.datasets.demonstrations,
        collate=collate_demonstrations,
        split=trunk.microbatches,
        heldout_loss=partial(heldout_loss, objective, context.datasets.demonstrations_heldout),
        metric_group="sft",
        lora_plus=context.experiment.policy.lora_plus,
    )
    result = fit(task, context.experiment.sft, context.fit_context("sft"))
    skipped = context.datasets.skipped.get("demonstrations", [])
    return asdict(result) | {"skipped_rows": len(skipped)}
