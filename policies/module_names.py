"""Finds the parts of a model, whatever its family calls them."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from policies.errors import UserError

KEY_VALUE_PROJECTIONS = ("k_proj", "v_proj", "query_key_value", "c_attn", "qkv_proj")
"""Linear layers that compute keys or values, some of them queries too."""
SUBLAYER_OUTPUTS = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "fc2")
"""Last linear layers of attention and of the MLP, as model families name them."""
FEEDFORWARD_OUTPUTS = ("down_proj", "mlp.c_proj", "dense_4h_to_h", "fc2")
"""Last linear layers of the MLP."""


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers. Raises UserError where no list has as many modules as the config says there are layers."""
    count = model.config.num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(model).__name__} has no list of {count} decoder layers: use policy.method lora")


def linears(model: PreTrainedModel) -> dict[str, Any]:
    """The linear layers of the decoder layers, by name in the model."""
    inside = {id(module) for module in blocks(model).modules()}
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) in inside:
            layers[name] = module
    return layers


def norms(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The normalisation layers that have parameters, by name in the model."""
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__ and next(module.parameters(), None) is not None:
            layers[name] = module
    return layers


def names_ending_in(names: Iterable[str], endings: Sequence[str]) -> list[str]:
    """The dotted names whose last parts are one of the endings."""
    suffixes = tuple(f".{ending}" for ending in endings)
    return [name for name in names if f".{name}".endswith(suffixes)]


def ia3_layers(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Names of the layers that (IA)³ scales: those of keys, values and the MLP's output; and of the MLP's alone."""
    names = linears(model)
    feedforward = names_ending_in(names, FEEDFORWARD_OUTPUTS)
    return names_ending_in(names, KEY_VALUE_PROJECTIONS) + feedforward, feedforward


def sublayer_outputs(model: PreTrainedModel, targets: str | Sequence[str] | None) -> list[tuple[nn.Module, str]]:
    """(parent module, name in it) of the last linear layers of attention and MLP, or of those that `targets` names.

    Raises UserError where no layer of the model has such a name.
    """
    endings = [targets] if isinstance(targets, str) else list(targets or SUBLAYER_OUTPUTS)
    layers = linears(model)
    names = names_ending_in(layers, endings)
    if not names:
        known = sorted({name.rpartition(".")[2] for name in layers})
        raise UserError(
            f"policy.targets: no linear layer of {type(model).__name__} is named {' or '.join(endings)}; "
            f"it has {', '.join(known)}"
        )
    outputs: list[tuple[nn.Module, str]] = []
    for full_name in names:
        parent, _, name = full_name.rpartition(".")
        outputs.append((model.get_submodule(parent), name))
    return outputs
