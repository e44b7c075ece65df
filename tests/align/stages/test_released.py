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
alive_at_load: list[list[str]] = []
"""For every base that was loaded, what was alive of the earlier ones."""


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Record the bases that are loaded, and leave cycles where they are, so that a test sees them."""

    def load(*inputs: Any) -> PreTrainedModel:
        alive_at_load.append(alive())
        model = load_base(*inputs)
        loaded.extend(weakref.ref(module) for module in model.modules())
        return model

    monkeypatch.setattr(policies.build, "load_base", load)
    loaded.clear()
    alive_at_load.clear()
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive() -> list[str]:
    return [type(module).__name__ for reference in loaded if (module := reference()) is not None]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 3])
def test_nothing_of_a_base_is_left_after_any_stage(
    recorded: None, tiny_model: Path, tmp_path: Path, zero: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: dict[str, list[str]] = {}
    run_stage = pipeline._run_stage

    def run_and_look(context: StageContext, stage: str) -> None:
        before = len(loaded)
        run_stage(context, stage)
        assert len(loaded) > before
        left[stage] = alive()

    monkeypatch.setattr(pipeline, "_run_stage", run_and_look)
    settings = make_settings(tiny_model, tmp_path)
    settings["learner"]["zero"] = zero
    run = run_in_process(settings)
    assert left == {"sft": [], "reward": [], "ppo": []}

    trained = open_run(run)
    trained.generate(["User: two Assistant:"])
    trained.score(["User: two Assistant:"], [" three."])
    trained.evaluate()
    assert alive()
    del trained
    assert alive() == []


@pytest.mark.parametrize("zero", [0, 3])
def test_a_process_holds_one_base_at_a_time(recorded: None, tiny_model: Path, tmp_path: Path, zero: int) -> None:
    """Each stage loads the base once to train, and the reward stage once more to evaluate, after training."""
    settings = make_settings(tiny_model, tmp_path)
    settings["stages"] = ["sft", "reward"]
    settings["learner"]["zero"] = zero
    settings["reward"]["ensemble"] = {"members": 2}
    run_in_process(settings)
    sft, members, evaluation = 1, 2, 1
    assert [len(names) for names in alive_at_load] == [0] * (sft + members + evaluation)
