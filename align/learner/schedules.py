"""Learning-rate schedules: the factor of each step."""

import torch
from torch import nn
from torch.optim import SGD
from transformers import get_scheduler

from policies.schema import Schedule


def schedule_factor(name: Schedule, step: int, steps: int, warmup: float) -> float:
    """The factor by which one of transformers' schedules multiplies the learning rate.

    Args:
        name: the schedule.
        step: from 0.
        steps: how many steps there are in all.
        warmup: share of the steps over which the factor rises to 1.
    """
    probe = SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    warmup_steps = round(warmup * steps)
    schedule = get_scheduler(warmed(name), probe, num_warmup_steps=warmup_steps, num_training_steps=steps)
    # A warmup from exactly zero would waste the first step, so its steps count from one.
    counted_step = step + 1 if step < warmup_steps else step
    return float(schedule.lr_lambdas[0](counted_step))


def warmed(schedule: Schedule) -> str:
    """The name of the schedule with a warmup in transformers, whose `constant` has none."""
    return "constant_with_warmup" if schedule == "constant" else schedule
