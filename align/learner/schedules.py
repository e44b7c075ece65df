"""Learning-rate schedules: the factor of each step."""

import torch
from torch import nn
from torch.optim import SGD
from transformers import get_scheduler

from policies.schema import Schedule


def schedule_factor(name: Schedule, step: int, steps: int, warmup: float) -> float:
    """The factor by which a schedule multiplies the learning rate, computed by transformers.

    Args:
        name: The schedule.
        step: The step, counted from 0.
        steps: Total number of steps.
        warmup: Share of the steps over which the factor rises to 1.

    Returns:
        The factor of this step.
    """
    probe = SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    warmup_steps = round(warmup * steps)
    schedule = get_scheduler(warmed(name), probe, num_warmup_steps=warmup_steps, num_training_steps=steps)
    # A warmup from exactly zero would waste the first step, so its steps count from one.
    counted_step = step + 1 if step < warmup_steps else step
    return float(schedule.lr_lambdas[0](counted_step))


def warmed(schedule: Schedule) -> str:
    """The name of the schedule with a warmup in transformers, whose `constant` has no warmup."""
    return "constant_with_warmup" if schedule == "constant" else schedule
