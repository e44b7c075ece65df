"""The memory of a rank of each stage's learner, on one rank and on two, beside what `align plan` says.

    python experiments/benchmarks/rank_memory.py --model MODEL

Trains all weights of a random Llama of about 25 M parameters in float32 with Adam, at every ZeRO stage. A rank counts
the bytes of all tensors in its process just before its second optimizer step, when it holds the weights, the complete
gradient and the optimizer's state. Of the ranks, the largest counts.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from inputs import add_model, require_model
from memory import live_tensors, make_small
from transformers import AutoConfig

from align.algorithms.episodes import Episode
from align.config.schema import ClusterSettings, Experiment
from align.data.examples import TokenizedDemonstration, TokenizedPreference
from align.learner.ray_ranks import RayRanks
from align.ppo.learner import StepCoefficients
from align.ppo.learners import build_ppo_learner
from align.resources.memory import estimate_memory, measure
from align.resources.ray_cluster import ray_cluster
from align.roles.build import Blueprint, RewardRole, build_roles
from align.supervised.learner import build_learner
from align.supervised.reward_objective import RewardBlueprint
from align.supervised.sft_objective import SftBlueprint
from policies.device import ActorOptions, ComputeSettings
from rewards.preferences import Pair, PreferenceExample

EXAMPLES = 8
TOKENS = 16
"""Tokens of a prompt, and of a response."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    arguments = parser.parse_args()
    require_model(parser, arguments.model)
    print("| stage | ZeRO | one rank | as planned | two ranks | as planned | two over one |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, ray_cluster(ClusterSettings(), 3):
        model = make_small(arguments.model, Path(folder) / "small")
        one_thread = ActorOptions(ComputeSettings(1))
        ranks = {count: RayRanks(MeasuredRank, [one_thread] * count) for count in (1, 2)}
        for stage in STAGES:
            for zero in range(4):
                cells = []
                held = {}
                for count in ranks:
                    experiment = experiment_of(model, count, zero)
                    held[count] = max(ranks[count].call(MeasuredRank.held, *STAGES[stage](experiment)))
                    cells += [held[count], planned(experiment, stage)]
                figures = " | ".join(f"{cell / 1e6:,.0f} MB" for cell in cells)
                print(f"| {stage} | {zero} | {figures} | {held[2] / held[1]:.2f} |", flush=True)


def experiment_of(model: Path, ranks: int, zero: int) -> Experiment:
    settings = {
        "name": "memory",
        "model": {"path": str(model), "dtype": "float32"},
        "policy": {"method": "full"},
        "learner": {"ranks": ranks, "zero": zero},
        "rollouts": {"workers": 1},
    }
    return Experiment.model_validate(settings)


def planned(experiment: Experiment, stage: str) -> float:
    """The plan's bytes of a rank of the stage."""
    uses = estimate_memory(experiment, [stage], measure(experiment.model, experiment.policy))
    held = [use for use in uses if use.process in ("learner", "each of 2 ranks") and not use.transient]
    return sum(use.bytes for use in held)


class MeasuredRank:
    """A rank that builds one learner after another."""

    def held(self, build: Callable[[], Any], train: Callable[[Any], Any]) -> int:
        """The bytes of the tensors of a learner before its second step."""
        earlier = live_tensors()
        learner = build()
        step = learner.rank.step
        notes: list[int] = []

        def measured_step(*arguments: Any) -> Any:
            notes.append(sum(size for address, size in live_tensors().items() if address not in earlier))
            return step(*arguments)

        learner.rank.step = measured_step
        train(learner)
        train(learner)
        learner.rank.step = step
        learner.close()
        return notes[1]

    def close(self) -> None:
        """Nothing is held."""


# --- The stages: how a learner is built, and how it takes a step ------------------------------------------------------


def sft(experiment: Experiment) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    rows = random_rows(experiment, 2 * TOKENS)
    examples = [TokenizedDemonstration(row, [(TOKENS, 2 * TOKENS)]) for row in rows]
    blueprint = SftBlueprint(experiment.model, experiment.policy, 0, examples, examples, 1e-4)
    build = partial(build_learner, blueprint.build, experiment.sft, experiment.learner.zero, 0, False)
    return build, train_supervised


def reward(experiment: Experiment) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    pair = PreferenceExample("", ("better", "worse"), Pair())
    examples = []
    for row in random_rows(experiment, 3 * TOKENS):
        examples.append(TokenizedPreference(pair, row[:TOKENS], [row[TOKENS : 2 * TOKENS], row[2 * TOKENS :]]))
    settings = experiment.reward
    blueprint = RewardBlueprint(experiment.model, experiment.policy, 0, 0, None, examples, examples, settings)
    build = partial(build_learner, blueprint.build, settings, experiment.learner.zero, 0, False)
    return build, train_supervised


def train_supervised(learner: Any) -> None:
    learner.train(range(EXAMPLES), 0, 1.0)


def ppo(experiment: Experiment) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    probe = build_roles(Blueprint(experiment.model, experiment.policy, 0, None), None).trunk
    weights = probe.read_adapter("policy")
    head = {"weight": torch.zeros(probe.width), "bias": torch.zeros(1)}
    blueprint = Blueprint(experiment.model, experiment.policy, 0, weights, (RewardRole(weights, (head,)),))
    build = partial(build_ppo_learner, blueprint, experiment.ppo, experiment.learner, 1.0)
    zeros = torch.zeros(TOKENS)
    episodes = []
    for row in random_rows(experiment, 2 * TOKENS):
        # Old log-probabilities, log-probabilities of the reference, advantages, returns and old values.
        episodes.append(Episode(tuple(row[:TOKENS]), tuple(row[TOKENS:]), zeros, zeros, zeros + 1, zeros + 1, zeros))
    return build, partial(train_ppo, episodes)


def train_ppo(episodes: list[Episode], learner: Any) -> None:
    learner.update(episodes, [[list(range(EXAMPLES))]], StepCoefficients(1e-5, 1e-5, 0.0))


STAGES = {"sft": sft, "reward": reward, "ppo": ppo}


def random_rows(experiment: Experiment, length: int) -> list[list[int]]:
    """Random token ids, as many rows as there are examples."""
    vocabulary = AutoConfig.from_pretrained(experiment.model.path).vocab_size
    rows: list[list[int]] = torch.randint(vocabulary, (EXAMPLES, length)).tolist()
    return rows


if __name__ == "__main__":
    main()
