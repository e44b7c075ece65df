"""The context of every stage: settings, data, the run's folder, and models to start from."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from align.config.schema import Experiment
from align.config.stage import find_stage
from align.data.datasets import Datasets
from align.resources.peak_memory import PeakMemory
from align.roles.build import SFT_ROLE, build_sft_trunk
from align.runs.folder import RunFolder, write_facts
from align.runs.tracking import Tracker
from align.runtime.atomic_files import new_folder
from align.runtime.seeds import permutation, seed_for
from align.runtime.signals import StopRequest
from align.supervised.fit import FitContext
from policies.device import ActorOptions
from policies.errors import UserError
from policies.files.adapters import load_adapter
from policies.trunk import AdapterWeights, Trunk
from rewards.schema import FitSettings
from rollouts.engine import Sampling
from rollouts.trajectory import Request, Trajectory
from rollouts.transformers_engine import make_transformers_engine

if TYPE_CHECKING:
    from align.resources.reservation import Reservation  # Ray is slow to import


@dataclass(frozen=True)
class StageContext:
    """A run in progress.

    Attributes:
        experiment: The settings.
        run: The folder that the stages write to.
        tokenizer: Tokenizer of the base model.
        datasets: The examples of all stages, tokenized.
        tracker: Logs the metrics.
        stop: Checked after every step.
        reservation: The places of the run's Ray actors; None: it has none.
        peaks: The peak memory of the stage's processes.
    """

    experiment: Experiment
    run: RunFolder
    tokenizer: PreTrainedTokenizerBase
    datasets: Datasets
    tracker: Tracker
    stop: StopRequest
    reservation: "Reservation | None" = None
    peaks: PeakMemory = field(default_factory=PeakMemory)

    def actors(self, kind: str, count: int) -> list[ActorOptions]:
        """How Ray actors of a kind are started."""
        assert self.reservation is not None
        return self.reservation.actors(kind, count)

    def sft_weights(self) -> AdapterWeights | None:
        """The adapter of the SFT stage; None where there is none and the base itself is the SFT model."""
        return load_adapter(self.run.sft, self.experiment.policy) if self.run.sft.is_dir() else None

    def new_trunk(self, purpose: str, *roles: str) -> Trunk:
        """Load the base model with an adapter for `reference`, the SFT model, and for each of some roles.

        Args:
            purpose: Seeds the random initial weights.
            roles: The further roles.
        """
        experiment = self.experiment
        return build_sft_trunk(
            model=experiment.model,
            policy=experiment.policy,
            seed=experiment.seed,
            purpose=purpose,
            roles=(SFT_ROLE, *roles),
            sft=self.sft_weights(),
        )

    def fit_context(self, stage: str, settings: FitSettings, member: int = 0) -> FitContext:
        """The context of a supervised training run.

        Args:
            stage: Name of the stage.
            settings: The settings of the stage.
            member: Index of the ensemble member. Members are trained one after another, each with the data in a
                different order.
        """
        experiment = self.experiment
        return FitContext(
            stage=stage,
            metric_group=find_stage(stage).metric_groups[0],
            checkpoints=self.run.checkpoints(stage),
            keep=experiment.checkpoint.keep,
            seed=seed_for(experiment.seed, "member", member) if member else experiment.seed,
            tracker=self.tracker,
            stop=self.stop,
            policy=experiment.policy,
            base=experiment.model.path,
            ranks=experiment.ranks_of(settings),
            zero=experiment.zero_of(settings),
            first=member * experiment.reward.optimizer_steps(len(self.datasets.preferences)),
            checkpoint_minutes=experiment.checkpoint.minutes,
        )

    @contextmanager
    def new_product(self, folder: Path, facts: dict[str, Any], started: float) -> Iterator[Path]:
        """Fill a stage's folder in the block; it appears, with `stage.json`, once the block ends.

        Args:
            folder: The folder of the stage's product.
            facts: What `stage.json` records, besides the seconds.
            started: `time.perf_counter()` at the stage's start.
        """
        with new_folder(folder) as temporary:
            yield temporary
            self.write_facts(temporary, facts | {"seconds": time.perf_counter() - started})

    def write_facts(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write the facts of the stage's product, and what its processes have taken, to `stage.json`."""
        write_facts(folder, facts | {"peak_memory": self.peaks.by_kind()})

    def sample_sft(self, trunk: Trunk, count: int) -> list[Trajectory]:
        """Sample responses of the SFT model, role `reference` of the trunk, to this many random training prompts."""
        prompts = self._training_prompts()
        if not prompts:
            raise UserError("reward.normalise needs prompts: set data.prompts, or reward.normalise to 0")
        seed = self.experiment.seed
        rollouts = self.experiment.rollouts
        chosen = permutation(len(prompts), seed, "normalise")[:count]
        requests = [replace(prompts[i], seed=seed_for(seed, "normalise", i)) for i in chosen]
        engine = make_transformers_engine(trunk, self.tokenizer, rollouts.model_copy(update={"merge": False}))
        return engine.generate(requests, Sampling(rollouts.temperature, rollouts.max_new_tokens), role="reference")

    def _training_prompts(self) -> list[Request]:
        """The prompts of PPO or, without any, those of the preferences."""
        if self.datasets.prompts:
            return self.datasets.prompts
        prompts = []
        for preference in self.datasets.preferences:
            prompts.append(Request(preference.example.prompt, tuple(preference.prompt_ids), seed=0))
        return prompts
