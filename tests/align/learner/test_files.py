"""The states of a learner's ranks in the files of a checkpoint."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align.learner.files import read_states, write_states
from align.learner.state import LearnerState, TrainedWeights
from policies.schema import PolicySettings


class RanksStates(Sequence[LearnerState]):
    """States that are made when they are read, and that must not live when the next one is read."""

    def __init__(self) -> None:
        self.alive: list[weakref.ref[LearnerState]] = []

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        assert [state() for state in self.alive] == [None] * index
        state = LearnerState(TrainedWeights(), {"0.master": torch.full((2,), float(index))})
        self.alive.append(weakref.ref(state))
        return state


def test_the_state_of_one_rank_is_held_at_a_time_and_all_are_written(tmp_path: Path) -> None:
    policy = PolicySettings(rank=4, alpha=8)
    states = RanksStates()
    write_states(tmp_path, states, policy, "base")
    assert len(states.alive) == 3
    written = read_states(tmp_path, policy, [], [], ranks=3)
    assert [state.optimizer["0.master"].tolist() for state in written] == [[0, 0], [1, 1], [2, 2]]
