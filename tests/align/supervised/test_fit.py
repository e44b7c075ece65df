import pytest
import torch

from align.runtime.failures import Fault
from align.supervised.trainer import SkipNonFinite


def test_steps_with_non_finite_gradients_are_skipped_and_several_in_a_row_end_training() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    optimizer.register_step_pre_hook(SkipNonFinite(2, "sft"))

    def step(gradient: float) -> None:
        weight.grad = torch.full((2,), gradient)
        optimizer.step()

    step(float("nan"))
    assert weight.tolist() == [1.0, 1.0]
    step(1.0)
    moved = weight.tolist()
    assert moved != [1.0, 1.0]
    step(float("inf"))
    with pytest.raises(Fault, match=r"in 2 consecutive steps \(sft\.max_skipped\)"):
        step(float("inf"))
    assert weight.tolist() == moved
