"""The Ray actors that a run starts."""

from collections.abc import Collection, Mapping

from align.config.schema import Experiment
from align.data.datasets import trains_reward, trains_sft

RANK = "learner rank"
WORKER = "rollout worker"


def actors_by_stage(experiment: Experiment) -> dict[str, dict[str, int]]:
    """The number of actors of each kind that each stage starts, without kinds of which it starts none."""
    wanted: dict[str, dict[str, int]] = {}
    if trains_sft(experiment):
        wanted["sft"] = {RANK: experiment.ranks_of(experiment.sft)}
    if "classify" in experiment.stages:
        wanted["classify"] = {RANK: experiment.ranks_of(experiment.classify)}
    if trains_reward(experiment):
        wanted["reward"] = {RANK: experiment.ranks_of(experiment.reward)}
    if "dpo" in experiment.stages:
        wanted["dpo"] = {RANK: experiment.ranks_of(experiment.dpo)}
    if "ppo" in experiment.stages:
        wanted["ppo"] = {WORKER: experiment.rollouts.workers, RANK: experiment.learner.ranks}
    by_stage = {}
    for stage, counts in wanted.items():
        by_stage[stage] = {kind: count for kind, count in counts.items() if count}
    return by_stage


def most_actors(experiment: Experiment, stages: Collection[str]) -> dict[str, int]:
    """The largest number of actors of each kind that any of some stages starts."""
    most: dict[str, int] = {}
    for stage, counts in actors_by_stage(experiment).items():
        if stage in stages:
            for kind, count in counts.items():
                most[kind] = max(count, most.get(kind, 0))
    return most


def reserved_cpus(experiment: Experiment, actors: Mapping[str, int]) -> int:
    """CPUs that actors, so many of each kind, reserve together."""
    cpus = {RANK: experiment.learner.cpus or 1, WORKER: experiment.rollouts.cpus or 1}
    return sum(cpus[kind] * count for kind, count in actors.items())
