"""Supervised fine-tuning."""

from align.config.stage import Stage

STAGE = Stage(
    name="sft",
    order=10,
    summary="Fine-tune the base model on demonstrations.",
    folder="sft",
    scratch=("checkpoints/sft",),
    axis="sft/step",
    metric_groups=("sft",),
    sources=("demonstrations",),
    runner="align.stages.sft:run_sft",
    section="sft",
    product="adapter",
    default=True,
)
