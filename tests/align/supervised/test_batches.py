"""The batches of supervised stages: of even size, of examples of similar length, in random order."""

import math
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.runs.record_files import read_lines
from align.runtime.signals import Interrupted, StopRequest
from align.supervised.batches import batches_from, epoch_batches
from align.supervised.fit import fit
from rewards.schema import FitSettings
from tests.align.supervised.toy import ToyExample, ToyObjective, context_in, local_learners

example_lengths = st.lists(st.integers(1, 100), min_size=1, max_size=300)


@given(example_lengths, st.integers(1, 32), st.integers(0, 99))
def test_every_example_is_in_one_batch_and_sizes_differ_by_one_at_most(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    batches = epoch_batches(lengths, batch_size, seed, epoch=0)
    sizes = [len(batch) for batch in batches]
    assert sorted(chain(*batches)) == list(range(len(lengths)))
    assert len(batches) == math.ceil(len(lengths) / batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_epochs_differ_and_each_repeats_exactly() -> None:
    lengths = list(range(201))
    first = epoch_batches(lengths, batch_size=8, seed=0, epoch=0)
    second = epoch_batches(lengths, batch_size=8, seed=0, epoch=1)
    assert epoch_batches(lengths, batch_size=8, seed=0, epoch=0) == first != second
    assert epoch_batches(lengths, batch_size=8, seed=1, epoch=0) != first


@given(example_lengths, st.integers(1, 32), st.integers(0, 50))
def test_a_later_step_begins_where_the_earlier_ones_ended(lengths: list[int], batch_size: int, step: int) -> None:
    epochs = []
    for epoch in range(2):
        epochs += epoch_batches(lengths, batch_size, seed=0, epoch=epoch)
    assert list(islice(batches_from(0, lengths, batch_size, seed=0), len(epochs))) == epochs
    following = list(islice(batches_from(0, lengths, batch_size, seed=0), step, step + 9))
    assert list(islice(batches_from(step, lengths, batch_size, seed=0), 9)) == following


@pytest.mark.parametrize("examples", [6400, 6433, 1601])
def test_the_examples_of_a_batch_are_of_similar_length(examples: int) -> None:
    lengths = [index % 100 for index in range(examples)]
    batches = [[lengths[i] for i in batch] for batch in epoch_batches(lengths, batch_size=32, seed=0, epoch=0)]
    assert max(max(batch) - min(batch) for batch in batches) <= 6


def test_batches_come_in_random_order() -> None:
    """No part of an epoch has the long examples, and its end is like the rest."""
    lengths = [index % 100 for index in range(6433)]
    ends = []
    for seed in range(50):
        batches = [[lengths[i] for i in batch] for batch in epoch_batches(lengths, batch_size=32, seed=seed, epoch=0)]
        means = torch.tensor([sum(batch) / len(batch) for batch in batches])
        ranks = torch.arange(len(means), dtype=torch.float)
        assert abs(torch.corrcoef(torch.stack([means, ranks]))[0, 1]) < 0.3
        ends.append(means[-1].item())
    assert sum(ends) / len(ends) == pytest.approx(49.5, abs=12)  # the standard error is 4


def batches_of(folder: Path, interrupted: bool) -> list[list[int]]:
    """The batches of two and a half epochs of 41 examples, 12 at most in each."""
    examples = [ToyExample(number, length=number % 7 + 1) for number in range(41)]
    settings = FitSettings(batch_size=12, epochs=2.5)
    stop = StopRequest()
    batches = []
    for _ in range(20):
        stop.requested = interrupted
        objective = ToyObjective(examples)
        with local_learners(lambda: objective, settings) as learners:  # noqa: B023
            try:
                fit(learners, [example.length for example in examples], settings, context_in(folder, stop=stop))
            except Interrupted:
                continue
            finally:
                batches += objective.seen
        break
    # The loss is a mean over the batch, whatever its size.
    norms = [row["sft/gradient_norm"] for row in read_lines(folder / "metrics.jsonl") if "sft/gradient_norm" in row]
    assert norms == pytest.approx([math.sqrt(2)] * len(batches))
    return batches


def test_a_stage_trains_on_even_batches_and_resumes_with_the_next(tmp_path: Path) -> None:
    batches = batches_of(tmp_path / "whole", interrupted=False)
    assert [len(batch) for batch in batches[:4]] != [12, 12, 12, 5]
    for epoch in (batches[:4], batches[4:8]):
        assert sorted(len(batch) for batch in epoch) == [10, 10, 10, 11]
        assert sorted(chain(*epoch)) == list(range(41))
    assert len(batches) == 10
    assert batches_of(tmp_path / "parts", interrupted=True) == batches
