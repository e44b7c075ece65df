"""What a PPO checkpoint holds, in files."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from safetensors.torch import save_file

from align.config.schema import CriticSettings
from align.learner.state import LearnerState
from align.ppo.loop import PendingBatch
from align.runtime.atomic_files import write_json
from policies.errors import UserError
from policies.files.adapters import load_adapter, load_head, save_adapter, save_head
from policies.files.safe_reading import read_object, read_tensors
from policies.schema import PolicySettings
from policies.trunk import AdapterWeights

PENDING = "asked"
Count = Annotated[int, Field(ge=0)]


@dataclass
class PpoProgress:
    """How far PPO is, besides the learner's state.

    step: rounds that are done. kl_coefficient: of the next. best_step, best: of the best policy evaluated so far.
    reward: what the composition of the reward has learned. stop: best and offences of the rule that ends PPO early;
    stopped: why it did. seconds: spent so far. ranks, zero: the layout that the optimizer's state was saved in.
    pending: the versions under which the batches of the next steps were being answered. products: hashes of the
    reference and the reward model.
    """

    step: Count
    kl_coefficient: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    best_step: Count
    best: float | None
    reward: dict[str, Any]
    stop: list[float]
    stopped: str | None
    seconds: float
    ranks: Count
    zero: Count
    pending: list[Count]
    products: dict[str, str]


_PROGRESS = TypeAdapter(PpoProgress)


def write_state(
    folder: Path,
    states: Sequence[LearnerState],
    policy: PolicySettings,
    base: str,
    progressed: PpoProgress,
    pending: Collection[PendingBatch] = (),
) -> None:
    """Write policy, critic where there is one, each rank's part of the optimizer, and how far PPO is.

    pending: the batches that are being answered, of which the weights are kept: the same answers come of them again.
    """
    save_adapter(folder / "policy", states[0].policy, policy, base)
    for batch in pending:
        save_adapter(folder / PENDING / str(batch.step), batch.weights, policy, base)
    if states[0].critic:
        save_adapter(folder / "critic", states[0].critic, policy, base)
    if states[0].critic_head:
        save_head(folder / "critic", states[0].critic_head)
    for rank, state in enumerate(states):
        save_file(state.optimizer, folder / f"optimizer-{rank}.safetensors")
    write_json(folder / "state.json", asdict(progressed))


def read_progress(folder: Path, products: Mapping[str, str]) -> PpoProgress:
    """Raises UserError where the file does not say how far, or the run's reference or reward model is another now."""
    progressed = _validated_progress(folder / "state.json")
    for name, digest in products.items():
        if progressed.products.get(name) != digest:
            raise UserError(f"{name}/ is not what checkpoint {folder} was trained with: put the run's own back")
    return progressed


def _validated_progress(path: Path) -> PpoProgress:
    try:
        return _PROGRESS.validate_python(read_object(path), extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is damaged: {key}: {first['msg']}") from error


def read_pending(
    folder: Path, policy: PolicySettings, progressed: PpoProgress
) -> list[tuple[int, int, AdapterWeights]]:
    """Step, version and weights of each batch that was being answered."""
    steps = range(progressed.step, progressed.step + len(progressed.pending))
    versions = zip(steps, progressed.pending, strict=True)
    return [(step, version, load_adapter(folder / PENDING / str(step), policy)) for step, version in versions]


def read_states(folder: Path, policy: PolicySettings, critic: CriticSettings | None, ranks: int) -> list[LearnerState]:
    """One state a rank. Raises UserError where the checkpoint is of another kind of critic."""
    whole = {
        "policy": load_adapter(folder / "policy", policy),
        "critic": load_adapter(folder / "critic", policy) if critic and critic.kind != "head" else {},
        "critic_head": load_head(folder / "critic") if critic else {},
    }
    optimizers = [read_tensors(folder / f"optimizer-{rank}.safetensors") for rank in range(max(1, ranks))]
    return [LearnerState(optimizer=optimizer, **whole) for optimizer in optimizers]
