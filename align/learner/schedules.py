"""What a learning rate is multiplied by from step to step."""

import torch
from torch import nn
from torch.optim import SGD
from transformers import get_scheduler

from policies.schema import Schedule


def schedule_factor(name: Schedule, step: int, steps: int, warmup: float) -> float:
    """What a schedule of transformers multiplies the learning rate by at a step of `steps`."""
    probe = SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    warm = round(warmup * steps)
    schedule = get_scheduler(warmed(name), probe, num_warmup_steps=warm, num_training_steps=steps)
    # A warm-up from exactly zero would waste the first step, so steps count from one in it.
    return float(schedule.lr_lambdas[0](step + 1 if step < warm else step))


def warmed(schedule: Schedule) -> str:
    """The name under which transformers' schedule heeds a warm-up: its `constant` has none."""
    return "constant_with_warmup" if schedule == "constant" else schedule
