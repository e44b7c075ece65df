"""Rewards at every step are learned from fewer episodes than the same total at the end."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[3] / "experiments" / "benchmarks"


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("process_rewards")
    sys.modules.pop("process_rewards")


def test_step_rewards_need_at_most_half_of_the_episodes(chain: ModuleType) -> None:
    outcome = min(chain.median_episodes(False, rate, gamma=1.0, seeds=20) for rate in (0.4, 0.6))
    steps = chain.median_episodes(True, 0.6, gamma=0.5, seeds=20)
    assert steps <= outcome / 2
    assert outcome < chain.MOST_EPISODES
