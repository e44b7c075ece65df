"""The reward model."""

from align.config.stage import Stage

STAGE = Stage(
    name="reward",
    order=20,
    summary="Train the reward model on preferences, or on labels of steps, starting from the run's SFT model.",
    folder="reward",
    scratch=("checkpoints/reward",),
    axis="reward_model/step",
    metric_groups=("reward_model",),
    sources=("preferences", "step_labels"),
    runner="align.stages.reward:run_reward",
    section="reward",
    product="reward-model",
    evaluation="align.stages.reward:accuracy_figures",
    default=True,
)
