"""The same run in one process and in Ray actors."""

from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.tiny_run import figures, run_in_process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "ranks"),
    [(1, 1), (0, 1), (2, 2)],
)
def test_the_first_update_is_the_same_in_actors(
    workers: int, ranks: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = settings | {"ppo": settings["ppo"] | {"steps": 2}, "rollouts": settings["rollouts"] | {"chunk_size": 4}}
    alone = run_in_process(settings)
    split = {
        "name": "split",
        "rollouts": settings["rollouts"] | {"workers": workers},
        "learner": settings["learner"] | {"ranks": ranks},
    }
    actors = run_in_process(settings | split)
    ours, theirs = ([row for row in figures(run) if "policy/loss" in row] for run in (actors, alone))
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("policy/loss", "value/loss", "reward/mean", "rollout/tokens"):
            assert mine[name] == pytest.approx(other[name], abs=1e-5)
    assert not [p for p in psutil.Process().children(recursive=True) if "ray" in p.name()]
