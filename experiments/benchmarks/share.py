"""What share of the machine's matrix-product rate the updates of a run reach.

    python experiments/benchmarks/share.py EXPERIMENT.yaml

runs it (a base from `model.path` with LoRA, one process) and measures the rate right before and after each epoch: where
other guests share the machine it changes several times over from one second to the next. The last line printed is JSON:
of each epoch after the first update, the operations a second that it needed and those of matrix products beside it.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from operations import Shape, matrix_rate, shape_of, update_operations

from align import cli
from align.algorithms.episodes import Episode
from align.config.load import load_experiment
from align.learner.learner import Learner, StepCoefficients

ROUNDS = 5
"""Of eight products each, in a measurement: 20 to 200 ms."""


class Meter:
    """Updates epoch by epoch, each timed between two measurements of the rate."""

    def __init__(self, shape: Shape, critic_forward: bool, dtype: torch.dtype) -> None:
        self.shape, self.critic_forward, self.dtype = shape, critic_forward, dtype
        self.updates: list[list[dict[str, float]]] = []
        self.update = Learner.update

    def __call__(
        self,
        learner: Learner,
        episodes: Sequence[Episode],
        orders: Any,
        coefficients: StepCoefficients,
        mixed_in: Any = (),
    ) -> dict[str, float]:
        lengths = [(len(episode.prompt_ids), len(episode.response_ids)) for episode in episodes]
        needed = update_operations(self.shape, lengths, self.critic_forward)
        self.updates.append([])
        for order in orders:
            before = matrix_rate(self.dtype, rounds=ROUNDS)
            start = time.perf_counter()
            statistics = self.update(learner, episodes, [order], coefficients, mixed_in)
            seconds = time.perf_counter() - start
            beside = (before + matrix_rate(self.dtype, rounds=ROUNDS)) / 2
            self.updates[-1].append({"update_per_s": needed / seconds, "matrix_per_s": beside})
        return statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path)
    arguments = parser.parse_args()
    settings = load_experiment(arguments.experiment)
    meter = Meter(
        shape_of(Path(settings.model.path), settings.policy.rank),
        critic_forward=settings.ppo.critic.kind == "adapter",
        dtype=getattr(torch, settings.model.dtype),
    )
    Learner.update = lambda *given: meter(*given)  # a function, which is bound to the learner as a method is
    sys.argv = ["align", "run", str(arguments.experiment), "--replace"]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise
    print(json.dumps([epoch for update in meter.updates[1:] for epoch in update]))


if __name__ == "__main__":
    main()
