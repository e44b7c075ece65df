from typing import get_args

import pytest
import torch
from torch import nn
from torch.optim import SGD
from transformers import get_scheduler

from align.config.schema import LearnerSettings
from align.learner.schedules import schedule_factor
from policies.schema import Schedule


@pytest.mark.parametrize("name", get_args(Schedule))
def test_schedule_is_that_of_transformers_after_the_warmup(name: Schedule) -> None:
    steps, warm = 20, 0 if name == "constant" else 5
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warm, num_training_steps=steps)
    theirs = []
    for _ in range(steps):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    ours = [schedule_factor(name, step, steps, warm / steps) for step in range(steps)]
    assert ours[warm:] == pytest.approx(theirs[warm:], rel=1e-6)


def test_warmup_rises_from_its_first_step_and_reaches_the_whole_rate() -> None:
    assert [schedule_factor("linear", step, 20, 0.2) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_constant_schedule_is_one_throughout() -> None:
    assert {schedule_factor("constant", step, 10, 0.0) for step in range(10)} == {1.0}


def test_warmup_is_not_ignored_by_the_default_schedule() -> None:
    assert schedule_factor(LearnerSettings().schedule, 0, 10, 0.5) < 1.0
