"""Stage one: supervised fine-tuning on demonstrations."""

import time
from dataclasses import asdict
from functools import partial
from typing import Any

from align.stages.context import StageContext
from align.supervised.fit import fit
from align.supervised.sft_objective import SFT_ROLE, Likelihood, heldout_loss, tensors
from policies.files.adapters import load_adapter


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
            tensors,
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
