"""The batches of supervised stages: of even size, of examples of similar length, in random order."""

import math
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from align.runs.tracking import Tracker
from align.runtime.signals import Interrupted, StopRequest
from align.supervised.batches import LengthBatches
from align.supervised.fit import FitContext, FitTask, fit
from align.supervised.trainer import Objective
from rewards.schema import FitSettings

example_lengths = st.lists(st.integers(1, 100), min_size=1, max_size=300)


@given(example_lengths, st.integers(1, 32), st.integers(0, 99))
def test_every_example_is_in_one_batch_and_sizes_differ_by_one_at_most(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    batches = LengthBatches(lengths, batch_size, seed)
    drawn = list(batches)
    sizes = [len(batch) for batch in drawn]
    assert sorted(chain(*drawn)) == list(range(len(lengths)))
    assert len(batches) == len(drawn) == math.ceil(len(lengths) / batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_epochs_differ_and_each_repeats_exactly() -> None:
    batches = LengthBatches(list(range(201)), batch_size=8, seed=0)
    first = list(batches)
    batches.set_epoch(1)
    second = list(batches)
    batches.set_epoch(0)
    assert list(batches) == first != second
    assert list(LengthBatches(list(range(201)), batch_size=8, seed=1)) != first


@pytest.mark.parametrize("examples", [6400, 6433, 1601])
def test_the_examples_of_a_batch_are_of_similar_length(examples: int) -> None:
    lengths = [index % 100 for index in range(examples)]
    batches = [[lengths[i] for i in batch] for batch in LengthBatches(lengths, batch_size=32, seed=0)]
    assert max(max(batch) - min(batch) for batch in batches) <= 6


def test_batches_come_in_random_order() -> None:
    """No part of an epoch has the long examples, and its end is like the rest."""
    lengths = [index % 100 for index in range(6433)]
    ends = []
    for seed in range(50):
        batches = [[lengths[i] for i in batch] for batch in LengthBatches(lengths, batch_size=32, seed=seed)]
        means = torch.tensor([sum(batch) / len(batch) for batch in batches])
        ranks = torch.arange(len(means), dtype=torch.float)
        assert abs(torch.corrcoef(torch.stack([means, ranks]))[0, 1]) < 0.3
        ends.append(means[-1].item())
    assert sum(ends) / len(ends) == pytest.approx(49.5, abs=12)  # the standard error is 4


@dataclass(frozen=True)
class Example:
    number: int
    length: int


class Recorder(Objective):
    """Notes the examples of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.batches: list[list[int]] = []

    def forward(self, numbers: Tensor, labels: Tensor, num_items_in_batch: Tensor) -> dict[str, Tensor]:
        assert num_items_in_batch == len(labels)
        self.batches.append(numbers.tolist())
        return {"loss": self.weight.sum() / num_items_in_batch}


def collate(examples: list[Any]) -> dict[str, Tensor]:
    numbers = torch.tensor([example.number for example in examples])
    return {"numbers": numbers, "labels": numbers}


def batches_of(folder: Path, interrupted: bool) -> list[list[int]]:
    """The batches of two and a half epochs of 41 examples, 12 at most in each."""
    objective = Recorder()
    task = FitTask(
        objective=objective,
        examples=[Example(number, length=number % 7 + 1) for number in range(41)],
        collate=collate,
        split=lambda lengths, tokens: [list(range(len(lengths)))],
        heldout_loss=lambda: 0.0,
        metric_group="sft",
    )
    settings = FitSettings(batch_size=12, epochs=2.5)
    stop = StopRequest()
    folder.mkdir()
    context = FitContext(
        stage="sft", checkpoints=folder / "checkpoints", keep=1, seed=0, tracker=Tracker(folder, None), stop=stop
    )
    for _ in range(20):
        stop.requested = interrupted
        try:
            fit(task, settings, context)
        except Interrupted:
            continue
        break
    return objective.batches


def test_a_stage_trains_on_even_batches_and_resumes_with_the_next(tmp_path: Path) -> None:
    batches = batches_of(tmp_path / "whole", interrupted=False)
    assert [len(batch) for batch in batches[:4]] != [12, 12, 12, 5]
    for epoch in (batches[:4], batches[4:8]):
        assert sorted(len(batch) for batch in epoch) == [10, 10, 10, 11]
        assert sorted(chain(*epoch)) == list(range(41))
    assert len(batches) == 10
    assert batches_of(tmp_path / "parts", interrupted=True) == batches
