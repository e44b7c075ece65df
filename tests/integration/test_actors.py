"""The same run in one process and in Ray actors."""

import contextlib
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from align.stages import pipeline
from align.stages.context import StageContext
from tests.integration.tiny_run import figures, run_in_process

END_SECONDS = 30.0
"""A process that Ray has killed is gone after this time, even on a busy machine."""


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


@pytest.mark.slow
def test_no_actor_outlives_its_stage(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a stage can be in memory: the processes that computed it have ended."""
    run_stage = pipeline._run_stage
    stages = []

    def run_and_look(context: StageContext, stage: str) -> None:
        run_stage(context, stage)
        deadline = time.monotonic() + END_SECONDS
        while actors():
            assert time.monotonic() < deadline, f"{actors()} after {stage}"
            time.sleep(0.1)
        stages.append(stage)

    monkeypatch.setattr(pipeline, "_run_stage", run_and_look)
    run_in_process(
        settings | {"rollouts": settings["rollouts"] | {"workers": 1}, "learner": settings["learner"] | {"ranks": 1}}
    )
    assert stages == ["sft", "reward", "ppo"]


def actors() -> list[str]:
    """The names of the ranks and workers among the processes below this one."""
    names = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            names.append(process.cmdline()[0])
    return [name for name in names if name.startswith(("ray::_Rank", "ray::Worker"))]
