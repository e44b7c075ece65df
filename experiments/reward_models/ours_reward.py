"""Train a reward model by this library on the CPU, as one side of `bench.py`.

    python experiments/reward_models/ours_reward.py --model MODEL --preferences PREFERENCES.jsonl

Prints one line of JSON: the seconds of each step but the first.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from align.data.examples import preference_parser
from align.learner.group import LocalRank
from align.runs.tracking import Tracker
from align.runtime.quiet import quiet_libraries
from align.runtime.signals import StopRequest
from align.supervised.fit import FitContext, fit
from align.supervised.learner import SupervisedLearners, build_learner
from align.supervised.reward_objective import RewardBlueprint
from policies.files.base_model import load_tokenizer
from policies.schema import ModelSettings, PolicySettings
from policies.text.encoder import TextEncoder
from rewards.schema import RewardSettings


class Clock(Tracker):
    """Records when each step ended, and none of its figures."""

    def __init__(self) -> None:
        super().__init__(Path())
        self.ends: list[float] = []

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if "reward_model/loss" in metrics:
            self.ends.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a causal language model and its tokenizer")
    parser.add_argument("--preferences", type=Path, required=True, help="JSONL of preference examples")
    parser.add_argument("--batch", type=int, default=16, help="examples per step")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA adapter")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(arguments.threads)
    settings = RewardSettings(
        batch_size=arguments.batch,
        max_tokens=arguments.max_tokens,
        learning_rate=5e-4,
        ties="unknown",
        checkpoint_every=10**6,
    )
    parse = preference_parser(TextEncoder(load_tokenizer(arguments.model)), settings, max_positions=None)
    examples = [parse(json.loads(line)) for line in arguments.preferences.read_text().splitlines()]
    blueprint = RewardBlueprint(
        model=ModelSettings(path=arguments.model, dtype="float32"),
        policy=PolicySettings(rank=arguments.rank, alpha=2 * arguments.rank),
        seed=0,
        member=0,
        sft=None,
        examples=examples,
        heldout=examples[:1],
        settings=settings,
    )
    build = partial(
        build_learner,
        build_objective=blueprint.build,
        settings=settings,
        zero=0,
        seed=0,
        gradient_checkpointing=False,
    )
    clock = Clock()
    learners = SupervisedLearners(LocalRank(build))
    with tempfile.TemporaryDirectory() as folder:
        context = FitContext(
            stage="reward",
            metric_group="reward_model",
            checkpoints=Path(folder),
            keep=1,
            seed=0,
            tracker=clock,
            stop=StopRequest(),
            policy=blueprint.policy,
            base=arguments.model,
        )
        fit(learners, [example.length for example in examples], settings, context)
    learners.close()
    print(json.dumps({"seconds": [b - a for a, b in pairwise(clock.ends)]}))


if __name__ == "__main__":
    main()
