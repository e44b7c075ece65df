"""A PPO checkpoint in files.

policy/, critic/, optimizer-R.safetensors    the learner's state, see `align.learner.files`
state.json                                   `PpoProgress`
pending/STEP/                                the policy's adapter that the batch of a later step is being generated with
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, TypeAdapter

from align.config.ppo_settings import CriticSettings
from align.learner.files import read_record, write_states
from align.learner.state import LearnerState
from align.ppo.loop import PendingBatch
from align.runtime.atomic_files import write_json
from policies.errors import UserError
from policies.files.adapters import load_adapter, save_adapter
from policies.schema import PolicySettings
from policies.trunk import AdapterWeights

PENDING = "pending"


@dataclass
class PpoProgress:
    """The progress of PPO: everything in a checkpoint besides the learner's state and the weights.

    Attributes:
        step: Number of completed steps.
        kl_coefficient: KL coefficient of the next step.
        best_step: Step of the best policy evaluated so far.
        best: The best policy's value of the metric that selects it; None before the first evaluation.
        reward: State of the reward's composition.
        stop: State of the stop rule: the best value, and the number of consecutive violations; empty without a rule.
        stopped: Why the rule stopped PPO; None where it did not.
        seconds: Seconds spent on PPO so far.
        ranks: Number of ranks that saved the optimizer's state; 0: one rank in the controller's process.
        zero: ZeRO stage of these ranks.
        pending: Versions of the weights with which the batches of the next steps are being generated.
        products: Hashes of the reference and the reward model.
        logit_spacing: Unit of the sampler's mismatch, in nats, see `MismatchCheck`; None before it is measured.
    """

    step: NonNegativeInt
    kl_coefficient: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    best_step: NonNegativeInt
    best: float | None
    reward: dict[str, Any]
    stop: list[float]
    stopped: str | None
    seconds: float
    ranks: NonNegativeInt
    zero: NonNegativeInt
    pending: list[NonNegativeInt]
    products: dict[str, str]
    logit_spacing: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


_PROGRESS = TypeAdapter(PpoProgress)


@dataclass(frozen=True)
class SavedBatch:
    """A batch that was being generated when the checkpoint was written.

    Resubmitted with the same weights, it gets the same responses.

    Attributes:
        step: The step that will train on it.
        version: Version of the weights.
        weights: The policy's adapter of this version.
    """

    step: int
    version: int
    weights: AdapterWeights


def write_checkpoint(
    folder: Path,
    states: Sequence[LearnerState],
    policy: PolicySettings,
    base: str,
    progress: PpoProgress,
    pending: Collection[PendingBatch] = (),
) -> None:
    """Write a checkpoint.

    Args:
        folder: The folder of the checkpoint, which exists.
        states: The learner's state of each rank.
        policy: Settings of the adapters.
        base: The base model's folder or hub name.
        progress: The progress of PPO.
        pending: The batches that are being generated.
    """
    write_states(folder, states, policy, base)
    for batch in pending:
        save_adapter(folder / PENDING / str(batch.step), batch.weights, policy, base)
    write_json(folder / "state.json", asdict(progress))


def read_progress(folder: Path, products: Mapping[str, str]) -> PpoProgress:
    """Read the progress of PPO.

    Args:
        folder: The folder of the checkpoint.
        products: Hashes of the run's reference and reward model, as they are now.

    Raises:
        UserError: The file is damaged, or the run's reference or reward model has changed.
    """
    progress = read_record(folder / "state.json", _PROGRESS)
    for name, digest in products.items():
        if progress.products.get(name) != digest:
            raise UserError(f"{name}/ is not what checkpoint {folder} was trained with: restore the original")
    return progress


def read_pending(folder: Path, policy: PolicySettings, progress: PpoProgress) -> list[SavedBatch]:
    """Read the batches that were being generated, with their weights."""
    batches = []
    for step, version in enumerate(progress.pending, start=progress.step):
        weights = load_adapter(folder / PENDING / str(step), policy)
        batches.append(SavedBatch(step, version, weights))
    return batches


def trained_roles(critic: CriticSettings | None) -> tuple[list[str], list[str]]:
    """The roles whose adapters, and those whose heads PPO trains.

    Args:
        critic: Settings of the critic; None: no critic.
    """
    if critic is None:
        return ["policy"], []
    return ["policy"] if critic.kind == "head" else ["policy", "critic"], ["critic"]
