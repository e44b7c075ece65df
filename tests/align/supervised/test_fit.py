"""The loop of a supervised stage, on an objective without a model: skipped steps, schedule, epochs, early stopping."""

import math
from collections.abc import Iterator
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Any

import pytest
import torch

from align.learner.schedules import schedule_factor
from align.runs.checkpoint import checkpoints, step_of
from align.runs.record_files import read_lines
from align.runtime.failures import Fault
from align.runtime.signals import Interrupted
from align.supervised.fit import FitResult, finished, fit, fitted_weights
from rewards.schema import FitSettings
from tests.align.supervised.toy import ToyExample, ToyObjective, context_in, local_learners

NAN = math.nan


def train(objective: ToyObjective, settings: FitSettings, folder: Path, **context: Any) -> FitResult:
    """Train to the end, or until the stop that the context requests."""
    made = context_in(folder, **context)
    with local_learners(lambda: objective, settings, made.zero) as learners:
        return fit(learners, [example.length for example in objective.examples], settings, made)


def train_a_step_at_a_time(objectives: Iterator[ToyObjective], settings: FitSettings, folder: Path) -> FitResult:
    """Train, stopped after every step and taken up by the next objective."""
    while (result := finished(context_in(folder))) is None:
        context = context_in(folder)
        context.stop.requested = True
        with pytest.raises(Interrupted):
            train(next(objectives), settings, folder, stop=context.stop)
    return result


def logged(folder: Path, name: str) -> list[float]:
    """A metric of every step that has it."""
    return [row[f"sft/{name}"] for row in read_lines(folder / "metrics.jsonl") if f"sft/{name}" in row]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_steps_with_non_finite_gradients_are_skipped_and_several_in_a_row_end_training(
    zero: int, tmp_path: Path
) -> None:
    objective = ToyObjective([ToyExample(0)], gradients=iter([NAN, 1.0, math.inf, -math.inf]))
    settings = FitSettings(batch_size=1, epochs=9, max_skipped=2)
    with local_learners(lambda: objective, settings, zero) as learners:
        with pytest.raises(Fault, match=r"in 2 consecutive steps \(sft\.max_skipped\)"):
            fit(learners, [1], settings, context_in(tmp_path, zero=zero))
        last = learners.product().heads["toy"]["0.weight"].tolist()
    start, skipped, moved, skipped_again = objective.weights
    assert start == skipped == [0.0, 0.0]
    assert moved == skipped_again == last
    assert moved[0] < -0.01
    assert moved[1] < -0.01


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_skipped_step_leaves_the_optimizer_as_it_is(zero: int) -> None:
    objective = ToyObjective([ToyExample(0)], gradients=iter([1.0, NAN, 1.0]))
    states = []
    with local_learners(lambda: objective, FitSettings(), zero) as learners:
        for step in range(3):
            assert learners.train([0], step, 1.0).skipped == (step == 1)
            states.append(learners.state()[0].optimizer)
    before, skipped, after = states
    assert "0.state.step" in before
    assert before.keys() == skipped.keys() == after.keys()
    assert all(torch.equal(before[name], skipped[name]) for name in before)
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_the_message_of_too_many_skipped_steps_names_the_setting_of_the_stage(tmp_path: Path) -> None:
    settings = FitSettings(batch_size=1, epochs=9, max_skipped=1)
    with pytest.raises(Fault, match=r"in 1 consecutive steps \(reward\.max_skipped\)"):
        train(ToyObjective([ToyExample(0)], gradients=repeat(NAN)), settings, tmp_path, stage="reward")


def test_skipped_steps_are_counted_across_a_resume(tmp_path: Path) -> None:
    """Two before the stop and one after it are three in a row."""
    settings = FitSettings(batch_size=1, epochs=9, max_skipped=3)
    objectives = (ToyObjective([ToyExample(0)], gradients=iter([value])) for value in (1.0, NAN, NAN, NAN, 1.0))
    with pytest.raises(Fault, match=r"in 3 consecutive steps \(sft\.max_skipped\)"):
        train_a_step_at_a_time(objectives, settings, tmp_path)
    assert len(list(objectives)) == 1


@pytest.mark.parametrize(("interrupted", "zero"), [(False, 0), (False, 2), (True, 0)])
def test_the_schedule_waits_while_steps_are_skipped(interrupted: bool, zero: int, tmp_path: Path) -> None:
    gradients = [1.0, NAN, NAN, 1.0, 1.0, NAN, 1.0]
    taken = [0, 1, 1, 1, 2, 3, 3]
    settings = FitSettings(batch_size=1, epochs=7, learning_rate=0.1, schedule="linear", warmup=0.0, optimizer="sgd")
    if interrupted:
        objectives = [ToyObjective([ToyExample(0)], gradients=iter([gradient])) for gradient in gradients]
        train_a_step_at_a_time(iter(objectives), settings, tmp_path)
    else:
        objectives = [ToyObjective([ToyExample(0)], gradients=iter(gradients))]
        train(objectives[0], settings, tmp_path, zero=zero)
    expected = [0.1 * schedule_factor("linear", step, 7, warmup=0.0) for step in taken]
    assert len(set(expected)) == 4
    assert logged(tmp_path, "learning_rate") == pytest.approx(expected)
    weights = [weight[0] for weight in chain(*(objective.weights for objective in objectives))]
    moves = [before - after for before, after in pairwise(weights)]
    steps = [0.0 if math.isnan(gradient) else rate / math.sqrt(2) for gradient, rate in zip(gradients, expected)]
    assert moves == pytest.approx(steps[:-1], rel=1e-4)  # a gradient of norm √2 is clipped to 1


@pytest.mark.parametrize(("epochs", "steps"), [(0.1, 1), (0.5, 2), (0.75, 3), (1.0, 4), (1.01, 5), (2.5, 10)])
def test_an_epoch_may_be_cut_short(epochs: float, steps: int, tmp_path: Path) -> None:
    """Of 15 examples in batches of 4 at most."""
    objective = ToyObjective([ToyExample(number) for number in range(15)])
    settings = FitSettings(batch_size=4, epochs=epochs, learning_rate=0.1, schedule="linear", warmup=0.0)
    result = train(objective, settings, tmp_path)
    assert len(objective.seen) == result.steps == steps
    assert logged(tmp_path, "learning_rate") == pytest.approx([0.1 * (1 - step / steps) for step in range(steps)])
    first_epoch = list(chain(*objective.seen[:4]))
    assert len(set(first_epoch)) == len(first_epoch)


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize(
    ("every", "patience", "losses", "steps", "best"),
    [
        (1, 2, [3.0, 1.0, 1.0, 2.0, 0.0], 4, 2),  # an equal loss is no better one
        (1, 2, [3.0, 1.0, 2.0, 0.5, 0.7, 0.6], 6, 4),
        (2, 1, [3.0, 1.0, 2.0], 6, 4),
        (3, None, [1.0, 3.0, 2.0], 8, 3),
        (0, None, [5.0], 8, 8),
        (1, None, [NAN, 3.0, NAN, 2.0, 4.0, NAN, NAN, NAN], 8, 4),
    ],
)
def test_the_weights_of_the_best_evaluation_are_kept(
    every: int, patience: int | None, losses: list[float], steps: int, best: int, interrupted: bool, tmp_path: Path
) -> None:
    settings = FitSettings(batch_size=1, epochs=8, evaluate_every=every, patience=patience)
    heldout = iter(losses)
    objectives = [ToyObjective([ToyExample(0)], heldout_losses=heldout) for _ in range(8)]
    if interrupted:
        result = train_a_step_at_a_time(iter(objectives), settings, tmp_path)
    else:
        result = train(objectives[0], settings, tmp_path)
    weights = list(chain(*(objective.weights for objective in objectives)))
    assert len(weights) == result.steps == steps
    assert result.best_step == best
    assert result.heldout_loss == min(loss for loss in losses[: steps // every if every else 1] if loss == loss)
    kept = fitted_weights(context_in(tmp_path), [], ["toy"]).heads["toy"]["0.weight"].tolist()
    if best < steps:
        assert kept == weights[best]
    assert kept != weights[best - 1]
    if best > 1:
        assert weights[best - 1] != weights[best - 2]


def test_a_checkpoint_is_written_once_the_minutes_have_passed_and_changes_nothing(tmp_path: Path) -> None:
    settings = FitSettings(batch_size=1, epochs=3, checkpoint_every=2)
    outcomes = []
    for name, minutes, expected in (("steps", math.inf, [2, 3]), ("minutes", 1e-9, [1, 2, 3])):
        objective = ToyObjective([ToyExample(0)])
        outcomes.append((train(objective, settings, tmp_path / name, keep=9, checkpoint_minutes=minutes), objective))
        assert [step_of(path) for path in checkpoints(tmp_path / name / "checkpoints")] == expected
    (by_steps, first), (by_minutes, second) = outcomes
    assert by_steps == by_minutes
    assert first.weights == second.weights
