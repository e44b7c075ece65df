"""The states of a learner's ranks in the files of a checkpoint.

ROLE/                      a trained adapter in PEFT's layout, and the role's heads in `head.safetensors`
ROLE.PART/                 what else is trained with a role, in `head.safetensors`
optimizer-R.safetensors    the part of the optimizer's state of each rank R
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from align.learner.state import LearnerState, TrainedWeights
from policies.errors import UserError
from policies.files.adapters import load_adapter, load_head, save_adapter, save_head
from policies.files.safe_reading import read_object, read_tensors
from policies.files.writing import save_tensors
from policies.schema import PolicySettings

Record = TypeVar("Record")


def write_states(folder: Path, states: Sequence[LearnerState], policy: PolicySettings, base: str) -> None:
    """Write the state of each rank to a folder, which exists.

    Args:
        folder: The folder of the checkpoint.
        states: The state of each rank, in order. They may be fetched when they are read, so each is read once, and
            freed before the next one is read.
        policy: Settings of the adapters.
        base: The base model's folder or hub name.
    """
    for rank in range(len(states)):
        _write_state(folder, rank, states[rank], policy, base)


def _write_state(folder: Path, rank: int, state: LearnerState, policy: PolicySettings, base: str) -> None:
    write_weights(folder, state.weights, policy, base)
    save_tensors(state.optimizer, folder / f"optimizer-{rank}.safetensors")


def write_weights(folder: Path, weights: TrainedWeights, policy: PolicySettings, base: str) -> None:
    """Write trained weights to a folder; arguments as of `write_states`."""
    for role, adapter in weights.adapters.items():
        save_adapter(folder / role, adapter, policy, base)
    for name, head in weights.heads.items():
        save_head(folder / name, head)


def read_states(
    folder: Path, policy: PolicySettings, adapters: Collection[str], heads: Collection[str], ranks: int
) -> list[LearnerState]:
    """Read what `write_states` has written.

    Args:
        folder: The folder of the checkpoint.
        policy: Settings of the adapters.
        adapters: The roles whose adapters are trained.
        heads: The names of the other trained modules.
        ranks: Number of ranks that wrote it; 0: one in the controller's process.

    Returns:
        One state per rank.

    Raises:
        UserError: A file is missing or damaged, or was written with other settings.
    """
    weights = read_weights(folder, policy, adapters, heads)
    states = []
    for rank in range(max(1, ranks)):
        optimizer = read_tensors(folder / f"optimizer-{rank}.safetensors")
        states.append(LearnerState(weights if rank == 0 else TrainedWeights(), optimizer))
    return states


def read_weights(
    folder: Path, policy: PolicySettings, adapters: Collection[str], heads: Collection[str]
) -> TrainedWeights:
    """Read what `write_weights` has written; arguments as of `read_states`."""
    weights = TrainedWeights()
    for role in adapters:
        weights.adapters[role] = load_adapter(folder / role, policy)
    for name in heads:
        weights.heads[name] = load_head(folder / name)
    return weights


def read_record(path: Path, kind: TypeAdapter[Record]) -> Record:
    """Read a dataclass that was written as JSON. Raises UserError where the file is damaged."""
    try:
        return kind.validate_python(read_object(path), extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is damaged: {key}: {first['msg']}") from error
