import pytest
import torch

from align.stages.reward import moments


def test_moments_are_those_of_the_population() -> None:
    assert moments(torch.tensor([1.0, 3.0])) == (2.0, 1.0)


@pytest.mark.parametrize("score", [0.0, 0.3, -250.0])
def test_scores_that_differ_by_rounding_are_not_scaled(score: float) -> None:
    scores = score * (1 + torch.tensor([0.0, 6e-8, -6e-8, 1.2e-7]))
    mean, std = moments(scores)
    assert mean == pytest.approx(score, rel=1e-6)
    assert std == 1.0
