"""The state of a supervised training besides its weights, in safetensors and JSON."""

import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerState

from align.runtime.atomic_files import write_json
from policies.errors import UserError
from policies.files.safe_reading import check_names_and_shapes, read_object, read_tensors
from policies.files.writing import save_tensors

STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
HYPERPARAMETERS = "rates.json"
RANDOM = "random.json"


def write_optimizer(folder: Path, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Write the optimizer's tensors, by the number of their parameter, and the hyperparameters of both."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    for number, values in state["state"].items():
        for name, tensor in values.items():
            tensors[f"{number}.{name}"] = tensor.detach().cpu().contiguous()
    save_tensors(tensors, folder / OPTIMIZER)
    write_json(folder / HYPERPARAMETERS, {"groups": state["param_groups"], "scheduler": scheduler.state_dict()})


def read_optimizer(folder: Path, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Restore what `write_optimizer` wrote. Raises UserError where it is damaged or of another model or optimizer."""
    tensors = read_tensors(folder / OPTIMIZER)
    hyperparameters = read_object(folder / HYPERPARAMETERS)
    _check_moments(tensors, optimizer, folder / OPTIMIZER)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, kind = name.partition(".")
        state.setdefault(int(number), {})[kind] = tensor
    _check_hyperparameters(hyperparameters, optimizer, scheduler, folder / HYPERPARAMETERS)
    optimizer.load_state_dict({"state": state, "param_groups": hyperparameters["groups"]})
    scheduler.load_state_dict(hyperparameters["scheduler"])


def write_random(folder: Path) -> None:
    """Write the states of Python's, NumPy's and torch's random number generators."""
    name, keys, *rest = tuple(np.random.get_state())
    states = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "cpu": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
    }
    write_json(folder / RANDOM, states)


def read_random(folder: Path) -> None:
    """Restore what `write_random` wrote. Raises UserError where it is damaged."""
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
    """Read the Trainer's progress. Raises UserError where the file is damaged."""
    path = folder / STATE
    names = {field.name for field in fields(TrainerState)}
    values = read_object(path)
    if unknown := sorted(values.keys() - names):
        raise UserError(f"{path} is damaged: {unknown[0]!r} is not in a Trainer's state")
    for name in ("global_step", "best_global_step"):
        value = values.get(name)
        is_unset = value is None and name == "best_global_step"
        if not is_unset and (type(value) is not int or value < 0):
            raise UserError(f"{path} is damaged: {name} is {value!r}")
    if not isinstance(values.get("best_metric"), int | float | None):
        raise UserError(f"{path} is damaged: best_metric is {values['best_metric']!r}")
    return TrainerState(**values)


def _check_moments(tensors: dict[str, Tensor], optimizer: Optimizer, path: Path) -> None:
    """Check that the tensors are Adam's moments and steps of the optimizer's parameters."""
    parameters: list[Tensor] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    by_number: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, kind = name.partition(".")
        by_number.setdefault(number, {})[kind] = tensor
    for number in sorted(by_number):
        if not number.isdecimal() or int(number) >= len(parameters):
            raise UserError(
                f"{path} is not of this model: it has a parameter {number!r}, and the model {len(parameters)}"
            )
        parameter = parameters[int(number)]
        expected = {"exp_avg": parameter, "exp_avg_sq": parameter, "step": torch.zeros(())}
        check_names_and_shapes(by_number[number], expected, path)


def _check_hyperparameters(saved: dict[str, Any], optimizer: Optimizer, scheduler: LRScheduler, path: Path) -> None:
    """Check that the saved hyperparameters have the names and types of those in use."""
    current = {"groups": optimizer.state_dict()["param_groups"], "scheduler": scheduler.state_dict()}
    if _structure(saved) != _structure(current):
        raise UserError(f"{path} is not of this optimizer: its hyperparameters have other names or types")


def _structure(value: Any) -> Any:
    """The structure of a JSON value: every leaf replaced by its type."""
    if isinstance(value, dict):
        return {name: _structure(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_structure(item) for item in value]
    return "number" if type(value) in (int, float) else type(value).__name__
