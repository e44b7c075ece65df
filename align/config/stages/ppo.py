"""Proximal policy optimization."""

from align.config.stage import Stage

STAGE = Stage(
    name="ppo",
    order=30,
    summary="Run PPO from the run's SFT and reward models.",
    folder="policy",
    scratch=("best", "checkpoints/ppo"),
    axis="ppo/step",
    metric_groups=("reward", "kl", "policy", "value", "rollout", "learner", "time", "perf", "eval"),
    sources=("prompts",),
    runner="align.stages.ppo:run_ppo",
    section="learner",
    product="adapter",
    evaluation="align.stages.ppo:policy_figures",
    default=True,
)
