"""What a checkpoint of a supervised stage holds besides the weights, in safetensors and JSON."""

import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerState

from align.runtime.atomic_files import write_json
from policies.errors import UserError
from policies.files.safe_reading import check_names_and_shapes, read_object, read_tensors

STATE = "trainer_state.json"
OPTIMIZER, HYPERPARAMETERS, RANDOM = "optimizer.safetensors", "rates.json", "random.json"


def write_optimizer(folder: Path, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Write the optimizer's tensors, by the number of their parameter, and the settings of both."""
    state = optimizer.state_dict()
    tensors = {f"{n}.{name}": value for n, values in state["state"].items() for name, value in values.items()}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / OPTIMIZER)
    write_json(folder / HYPERPARAMETERS, {"groups": state["param_groups"], "scheduler": scheduler.state_dict()})


def read_optimizer(folder: Path, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Take up what `write_optimizer` wrote. Raises UserError where it is not of such an optimizer."""
    tensors, rates = read_tensors(folder / OPTIMIZER), read_object(folder / HYPERPARAMETERS)
    _check_moments(tensors, optimizer, folder / OPTIMIZER)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, kind = name.partition(".")
        state.setdefault(int(number), {})[kind] = tensor
    _check_rates(rates, optimizer, scheduler, folder / HYPERPARAMETERS)
    optimizer.load_state_dict({"state": state, "param_groups": rates["groups"]})
    scheduler.load_state_dict(rates["scheduler"])


def write_random(folder: Path) -> None:
    """Write the states of Python's, NumPy's and torch's random numbers."""
    name, keys, *rest = tuple(np.random.get_state())
    states = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "cpu": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
    }
    write_json(folder / RANDOM, states)


def read_random(folder: Path) -> None:
    """Take up what `write_random` wrote. Raises UserError where it cannot be."""
    states = read_object(folder / RANDOM)
    try:
        version, inner, gauss = states["python"]
        random.setstate((version, tuple(inner), gauss))
        np.random.set_state(tuple(states["numpy"]))
        torch.set_rng_state(torch.tensor(states["cpu"], dtype=torch.uint8))
        if torch.cuda.is_available() and states["cuda"] is not None:
            torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{folder / RANDOM} is damaged: {error}") from error


def read_state(folder: Path) -> TrainerState:
    """How far the Trainer was. Raises UserError where the file does not say."""
    path = folder / STATE
    known = {field.name for field in fields(TrainerState)}
    values = read_object(path)
    if odd := sorted(values.keys() - known):
        raise UserError(f"{path} is damaged: {odd[0]!r} is not in a Trainer's state")
    for name in ("global_step", "best_global_step"):
        value = values.get(name)
        if not (value is None and name == "best_global_step") and (type(value) is not int or value < 0):
            raise UserError(f"{path} is damaged: {name} is {value!r}")
    if not isinstance(values.get("best_metric"), int | float | None):
        raise UserError(f"{path} is damaged: best_metric is {values['best_metric']!r}")
    return TrainerState(**values)


def _check_moments(tensors: dict[str, Tensor], optimizer: Optimizer, path: Path) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number in sorted({name.partition(".")[0] for name in tensors}):
        if not number.isdecimal() or int(number) >= len(parameters):
            raise UserError(f"{path} is not of this model: it has a parameter {number!r}, of {len(parameters)}")
        like = {"exp_avg": parameters[int(number)], "exp_avg_sq": parameters[int(number)], "step": torch.zeros(())}
        own = {name.partition(".")[2]: t for name, t in tensors.items() if name.partition(".")[0] == number}
        check_names_and_shapes(own, like, path)


def _check_rates(rates: dict[str, Any], optimizer: Optimizer, scheduler: LRScheduler, path: Path) -> None:
    """The saved settings must have the form of those that are in force."""
    now = {"groups": optimizer.state_dict()["param_groups"], "scheduler": scheduler.state_dict()}
    if _form(rates) != _form(now):
        raise UserError(f"{path} is not of this optimizer: its settings have other names or kinds")


def _form(value: Any) -> Any:
    """The names in a JSON value, and what kind each is."""
    if isinstance(value, dict):
        return {name: _form(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_form(item) for item in value]
    return "number" if type(value) in (int, float) else type(value).__name__
