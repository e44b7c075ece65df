"""Measure the share of the machine's matrix-product rate that a run's updates reach.

    python experiments/benchmarks/share.py EXPERIMENT.yaml

Runs the experiment (LoRA, one process) and measures the rate right before and after each epoch, because on a shared
machine it changes severalfold from one second to the next. The last line printed is JSON: for each epoch after the
first update, the operations per second of the epoch and of the matrix products around it.
"""

import argparse
import json
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from inputs import require_paths
from operations import Shape, matrix_rate, shape_of, update_operations

from align import cli
from align.config.load import load_experiment
from align.ppo.episode_shards import EpisodeShards
from align.ppo.learner import PpoLearner, StepCoefficients

ROUNDS = 5
"""Rounds of eight products per measurement, which takes 20 to 200 ms."""


class Meter:
    """Updates epoch by epoch, each timed between two measurements of the matrix-product rate."""

    def __init__(self, shape: Shape, critic_forward: bool, dtype: torch.dtype) -> None:
        self.shape = shape
        self.critic_forward = critic_forward
        self.dtype = dtype
        self.updates: list[list[dict[str, float]]] = []
        self.update = PpoLearner.update

    def __call__(
        self,
        learner: PpoLearner,
        shards: EpisodeShards,
        orders: Any,
        coefficients: StepCoefficients,
        demonstrations: Any = (),
    ) -> dict[str, float]:
        episodes = [shards.load(index) for index in chain.from_iterable(orders[0])]  # an epoch has each of them once
        lengths = [(len(episode.prompt_ids), len(episode.response_ids)) for episode in episodes]
        operations = update_operations(self.shape, lengths, self.critic_forward)
        self.updates.append([])
        for order in orders:
            before = matrix_rate(self.dtype, rounds=ROUNDS)
            start = time.perf_counter()
            statistics = self.update(learner, shards, [order], coefficients, demonstrations)
            seconds = time.perf_counter() - start
            around = (before + matrix_rate(self.dtype, rounds=ROUNDS)) / 2
            self.updates[-1].append({"update_per_s": operations / seconds, "matrix_per_s": around})
        return statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path)
    arguments = parser.parse_args()
    require_paths(parser, arguments.experiment)
    settings = load_experiment(arguments.experiment)
    meter = Meter(
        shape_of(Path(settings.model.path), settings.policy.rank),
        critic_forward=settings.ppo.critic.kind == "adapter",
        dtype=getattr(torch, settings.model.dtype),
    )
    PpoLearner.update = lambda *args: meter(*args)  # a plain function, so that Python binds it to the learner
    sys.argv = ["align", "run", str(arguments.experiment), "--replace"]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise
    print(json.dumps(list(chain.from_iterable(meter.updates[1:]))))


if __name__ == "__main__":
    main()
