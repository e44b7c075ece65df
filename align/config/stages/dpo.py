"""Preference optimisation."""

from align.config.stage import Stage

STAGE = Stage(
    name="dpo",
    order=25,
    summary="Optimise the policy on preferences directly (DPO, IPO, KTO, SimPO), from the run's SFT model.",
    folder="dpo",
    scratch=("checkpoints/dpo",),
    axis="dpo/step",
    metric_groups=("dpo",),
    sources=("preferences",),
    runner="align.stages.dpo:run_dpo",
    section="dpo",
    product="adapter",
    evaluation="align.stages.dpo:evaluation_figures",
)
