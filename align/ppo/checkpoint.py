"""What a PPO checkpoint holds, in files."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from align.files import write_json
from align.ppo.learner import LearnerState
from align.schema import CriticSettings
from policies.adapters import load_adapter, load_head, save_adapter, save_head
from policies.errors import UserError
from policies.schema import PolicySettings


@dataclass
class Progressed:
    """How far PPO is, besides the learner's state.

    step: rounds that are done. kl_coefficient: of the next. best_step, best: of the best policy evaluated so far.
    reward: what the composition of the reward has learned. stop: best and offences of the rule that ends PPO early;
    stopped: why it did. seconds: spent so far. ranks, zero: the layout that the optimizer's state was saved in.
    """

    step: int
    kl_coefficient: float
    best_step: int
    best: float | None
    reward: dict[str, Any]
    stop: list[float]
    stopped: str | None
    seconds: float
    ranks: int
    zero: int


def write_state(
    folder: Path, states: Sequence[LearnerState], policy: PolicySettings, base: str, progressed: Progressed
) -> None:
    """Write policy, critic where there is one, each rank's part of the optimizer, and how far PPO is."""
    save_adapter(folder / "policy", states[0].policy, policy, base)
    if states[0].critic:
        save_adapter(folder / "critic", states[0].critic, policy, base)
    if states[0].critic_head:
        save_head(folder / "critic", states[0].critic_head)
    for rank, state in enumerate(states):
        save_file(state.optimizer, folder / f"optimizer-{rank}.safetensors")
    write_json(folder / "state.json", asdict(progressed))


def read_progress(folder: Path, ranks: int, zero: int) -> Progressed:
    """Raises UserError where the optimizer's state was saved in another layout."""
    progressed = Progressed(**json.loads((folder / "state.json").read_text()))
    if (progressed.ranks, progressed.zero) != (ranks, zero):
        raise UserError(
            f"checkpoint {folder} was written by {progressed.ranks} ranks at ZeRO {progressed.zero}, and "
            f"learner.ranks is {ranks}, learner.zero {zero}: set them as they were"
        )
    return progressed


def read_states(folder: Path, policy: PolicySettings, critic: CriticSettings | None, ranks: int) -> list[LearnerState]:
    """One state a rank. Raises UserError where the checkpoint is of another kind of critic."""
    whole = {
        "policy": load_adapter(folder / "policy", policy),
        "critic": load_adapter(folder / "critic", policy) if critic and critic.kind != "head" else {},
        "critic_head": load_head(folder / "critic") if critic else {},
    }
    optimizers = [load_file(folder / f"optimizer-{rank}.safetensors") for rank in range(max(1, ranks))]
    return [LearnerState(optimizer=optimizer, **whole) for optimizer in optimizers]
