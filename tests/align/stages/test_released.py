"""After each stage, nothing is left of the models that it loaded, without a garbage collection by hand."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import PreTrainedModel

import policies.build
from align.outputs.trained_run import open_run
from align.stages import pipeline
from align.stages.context import StageContext
from policies.files.base_model import load_base
from tests.integration.tiny_run import make_settings, run_in_process

loaded: list[weakref.ref[nn.Module]] = []
"""Every module of every base that was loaded."""


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Record the bases that are loaded, and leave cycles where they are, so that a test sees them."""

    def load(*inputs: Any) -> PreTrainedModel:
        model = load_base(*inputs)
        loaded.extend(weakref.ref(module) for module in model.modules())
        return model

    monkeypatch.setattr(policies.build, "load_base", load)
    loaded.clear()
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive() -> list[str]:
    return [type(module).__name__ for reference in loaded if (module := reference()) is not None]


def test_nothing_of_a_base_is_left_after_any_stage(
    recorded: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: dict[str, list[str]] = {}
    run_stage = pipeline._run_stage

    def run_and_look(context: StageContext, stage: str) -> None:
        before = len(loaded)
        run_stage(context, stage)
        assert len(loaded) > before
        left[stage] = alive()

    monkeypatch.setattr(pipeline, "_run_stage", run_and_look)
    run = run_in_process(make_settings(tiny_model, tmp_path))
    assert left == {"sft": [], "reward": [], "ppo": []}

    trained = open_run(run)
    trained.generate(["User: two Assistant:"])
    trained.score(["User: two Assistant:"], [" three."])
    trained.evaluate()
    assert alive()
    del trained
    assert alive() == []
