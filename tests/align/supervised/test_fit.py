"""The loop of a supervised stage, on an objective without a model."""

import math
from pathlib import Path

import pytest

from align.runtime.failures import Fault
from align.supervised.fit import fit
from rewards.schema import FitSettings
from tests.align.supervised.toy import ToyExample, ToyObjective, context_in, local_learners


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_steps_with_non_finite_gradients_are_skipped_and_several_in_a_row_end_training(
    zero: int, tmp_path: Path
) -> None:
    objective = ToyObjective([ToyExample(0)], gradients=iter([math.nan, 1.0, math.inf, -math.inf]))
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
