"""A run in progress: what every stage is given."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from align.config.schema import Experiment
from align.data.datasets import Datasets
from align.runs.folder import RunFolder, write_facts
from align.runs.tracking import Tracker
from align.runtime.atomic_files import new_folder
from align.runtime.seeds import permutation, seed_for
from align.runtime.signals import StopRequest
from align.supervised.fit import FitContext, optimizer_steps
from policies.errors import UserError
from policies.files.adapters import load_adapter
from policies.methods.build import build_trunk
from policies.trunk import AdapterWeights, Trunk
from rollouts.engine import Sampling
from rollouts.trajectory import Request, Trajectory
from rollouts.transformers_engine import make_transformers_engine


@dataclass(frozen=True)
class StageContext:
    """Experiment, folder, data, and the ways to report and to be stopped."""

    experiment: Experiment
    run: RunFolder
    tokenizer: PreTrainedTokenizerBase
    datasets: Datasets
    tracker: Tracker
    stop: StopRequest

    def sft_weights(self) -> AdapterWeights | None:
        """The adapter of the SFT stage; None where there is none and the base itself is the SFT model."""
        return load_adapter(self.run.sft, self.experiment.policy) if self.run.sft.is_dir() else None

    def new_trunk(self, purpose: str, *roles: str) -> Trunk:
        """A trunk with `reference` and these roles, its first random weights seeded by purpose.

        `reference` holds the SFT adapter; where the base itself is the SFT model, an adapter as it starts.
        """
        torch.manual_seed(seed_for(self.experiment.seed, purpose, "adapters"))
        trunk = build_trunk(self.experiment.model, self.experiment.policy, ("reference", *roles))
        if weights := self.sft_weights():
            trunk.write_adapter("reference", weights)
        else:
            trunk.initialise("reference")
        return trunk

    def fit_context(self, stage: str, member: int = 0) -> FitContext:
        """member: of an ensemble, each of which sees the data in another order, and after the one before it."""
        seed, keep, folder = self.experiment.seed, self.experiment.checkpoint.keep, self.run.checkpoints(stage)
        if not member:
            return FitContext(stage, folder, keep, seed, self.tracker, self.stop)
        first = member * optimizer_steps(len(self.datasets.preferences), self.experiment.reward)
        return FitContext(stage, folder, keep, seed_for(seed, "member", member), self.tracker, self.stop, first)

    @contextmanager
    def new_product(self, folder: Path, facts: dict[str, Any], started: float) -> Iterator[Path]:
        """A stage's folder to fill; it is there, with `stage.json`, when the block ends."""
        with new_folder(folder) as temporary:
            yield temporary
            write_facts(temporary, facts | {"seconds": time.perf_counter() - started})

    def sample_sft(self, trunk: Trunk, count: int) -> list[Trajectory]:
        """Responses of the SFT model, role `reference` of the trunk, to so many of the training prompts."""
        prompts = self.datasets.prompts or [
            Request(c.example.prompt, tuple(c.prompt_ids), 0) for c in self.datasets.preferences
        ]
        if not prompts:
            raise UserError("reward.normalise needs prompts: set data.prompts, or reward.normalise to 0")
        seed, rollouts = self.experiment.seed, self.experiment.rollouts
        chosen = permutation(len(prompts), seed, "normalise")[:count]
        requests = [replace(prompts[i], seed=seed_for(seed, "normalise", i)) for i in chosen]
        engine = make_transformers_engine(trunk, self.tokenizer, rollouts.model_copy(update={"merge": False}))
        return engine.generate(requests, Sampling(rollouts.temperature, rollouts.max_new_tokens), role="reference")
