"""A model's memory is free as soon as nothing refers to its trunk: no full garbage collection is needed."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from policies.build import build_trunk
from policies.files.base_model import load_base
from policies.method_spec import methods
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import Trunk

VARIANTS = {name: PolicySettings(method=name) for name in methods()} | {
    "dora": PolicySettings(dora=True),
    "pissa": PolicySettings(init="pissa"),
    "loftq": PolicySettings(method="qlora", init="loftq"),
}
IDS = torch.arange(5, 15).view(1, 10)


@pytest.fixture(autouse=True)
def without_garbage_collection() -> Iterator[None]:
    """Leave cycles where they are, so that a test sees them."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def references(model: nn.Module) -> dict[str, weakref.ref[nn.Module]]:
    return {name: weakref.ref(module) for name, module in model.named_modules()}


def alive(modules: dict[str, weakref.ref[nn.Module]]) -> list[str]:
    return [name for name, reference in modules.items() if reference() is not None]


def used(settings: PolicySettings, model: ModelSettings, checkpointing: bool) -> Trunk:
    """A trunk that has computed, been trained, sampled by merged weights, and been merged for export."""
    trunk = build_trunk(model, settings, ("reference", "policy"))
    trunk.initialise("policy")
    if checkpointing:
        trunk.enable_gradient_checkpointing()
    trunk.train_only("policy")
    states = trunk.hidden(IDS, "policy")
    if states.requires_grad:
        states.sum().backward()
    trunk.merge("policy")
    with torch.no_grad():
        trunk.head(trunk.hidden_packed(IDS[0], [4, 6], "policy"), "policy")
    return trunk


@pytest.mark.parametrize("method", VARIANTS)
def test_nothing_of_a_trunk_is_left(tiny_model: Path, method: str) -> None:
    settings = VARIANTS[method]
    model = ModelSettings(path=str(tiny_model), dtype="float32")
    trunk = used(settings, model, checkpointing=not settings.spec.checkpointing_conflict)
    modules = references(trunk)
    del trunk
    assert alive(modules) == []


@pytest.mark.parametrize("policy", [None, PolicySettings(method="qlora")], ids=["float32", "qlora"])
def test_nothing_of_a_base_is_left(tiny_model: Path, policy: PolicySettings | None) -> None:
    model = load_base(ModelSettings(path=str(tiny_model), dtype="float32"), policy)
    modules = references(model)
    del model
    assert alive(modules) == []
