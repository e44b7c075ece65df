"""Supervised fine-tuning on demonstrations."""

import time
from dataclasses import asdict
from typing import Any

from align.roles.build import SFT_ROLE
from align.stages.context import StageContext
from align.stages.microbatch_size import with_kept_size
from align.stages.supervised import train
from align.supervised.fit import fitted_weights
from align.supervised.sft_objective import SftBlueprint
from policies.files.adapters import load_adapter, save_adapter
from policies.trunk import AdapterWeights

DEMONSTRATIONS = ("demonstrations", "mixture.")
"""The first parts of the names of the sources that SFT reads, under `data`."""


def run_sft(context: StageContext) -> None:
    """Train the adapter of role `reference` on the demonstrations, or adopt a ready-made one; write it to `sft/`."""
    started = time.perf_counter()
    experiment = context.experiment
    ready_made = experiment.sft.adapter
    if ready_made:
        adapter = load_adapter(ready_made, experiment.policy, experiment.sft.residual_base)
        facts: dict[str, Any] = {"adapter": ready_made}
    else:
        adapter, facts = _train(context)
    with context.new_product(context.run.sft, facts, started) as folder:
        save_adapter(folder, adapter, experiment.policy, experiment.model.path)


def _train(context: StageContext) -> tuple[AdapterWeights, dict[str, Any]]:
    """Train the adapter. Returns it and the facts of `stage.json`."""
    context = with_kept_size(context, "sft")
    experiment = context.experiment
    settings = experiment.sft
    demonstrations = context.datasets.demonstrations
    blueprint = SftBlueprint(
        model=experiment.model,
        policy=experiment.policy,
        seed=experiment.seed,
        examples=demonstrations,
        heldout=context.datasets.demonstrations_heldout,
        settings=settings,
    )
    fit_context = context.fit_context("sft", settings)
    lengths = [demonstration.length for demonstration in demonstrations]
    result = train(context, blueprint.build, lengths, settings, fit_context)
    adapter = fitted_weights(fit_context, [SFT_ROLE], []).adapters[SFT_ROLE]
    skipped = [len(rows) for name, rows in context.datasets.skipped.items() if name.startswith(DEMONSTRATIONS)]
    return adapter, asdict(result) | {"skipped_rows": sum(skipped)}
