"""The ranks reduce and gather in small pieces, and hold their partitions once, without changing any result."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import align.learner.engine
from align.learner.group import LocalRank
from align.learner.optimizer import GroupGradient
from align.learner.partitions import partitions
from policies.schema import PolicySettings
from rewards.schema import FitSettings
from tests.align.supervised.small import sft_blueprint
from tests.align.supervised.toy import local_learners

SETTINGS = FitSettings(learning_rate=1e-2, tokens_per_microbatch=16)


def trained(model: Path, policy: PolicySettings, zero: int, recompute: bool) -> dict[str, Tensor]:
    """The weights and the optimizer's state after two steps of two microbatches each."""
    blueprint = sft_blueprint(model, policy)
    with local_learners(blueprint.build, SETTINGS, zero=zero, recompute=recompute) as learners:
        for step in range(2):
            learners.train([2 * step, 2 * step + 1], step, 1.0)
        (state,) = learners.state()
    return state.weights.adapters["reference"] | state.optimizer


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("policy", [PolicySettings(rank=2), PolicySettings(method="full")], ids=["lora", "full"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_small_pieces_train_the_same_bit_for_bit(
    tiny_model: Path, zero: int, policy: PolicySettings, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of 100 elements, fewer than most parameters have, against one piece."""
    expected = trained(tiny_model, policy, zero, recompute)
    monkeypatch.setattr(align.learner.engine, "BUCKET", 100)
    actual = trained(tiny_model, policy, zero, recompute)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_optimizer_steps_the_weights_and_the_gradient_themselves(tiny_model: Path, zero: int) -> None:
    blueprint = sft_blueprint(tiny_model)
    with local_learners(blueprint.build, SETTINGS, zero=zero) as learners:
        ranks = learners.ranks
        assert isinstance(ranks, LocalRank)
        rank = ranks.learner.rank
        weights = set()
        for parameter in rank.module.parameters():
            if parameter.requires_grad:
                weights.add(storage(parameter.ds_tensor if zero == 3 else parameter))
        gradients: list[set[int]] = []
        stepped: list[int] = []
        clip = rank.clip._clip

        def note_gradients(parts: Sequence[GroupGradient]) -> bool:
            gradients.append({storage(tensor) for part in parts for tensor in part.tensors})
            return clip(parts)

        def note_stepped(optimizer: Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                stepped.extend(storage(parameter.grad) for parameter in group["params"] if parameter.grad is not None)

        rank.clip._clip = note_gradients
        assert isinstance(rank.optimizer, Optimizer)
        rank.optimizer.register_step_pre_hook(note_stepped)
        learners.train([0, 1], 0, 1.0)
        assert {storage(partition) for partition in partitions(rank.engine.optimizer)} == weights
        assert set(stepped) == gradients[0]


def storage(tensor: Tensor) -> int:
    """The address of a tensor's storage."""
    return tensor.untyped_storage().data_ptr()
