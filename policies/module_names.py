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
TRAIN_OUTSIDE = "The LM head is trained by policy.method top_layers, and the embeddings by full"
"""Advice for targets outside the decoder layers: reward model and critic have no LM head for an adapter."""


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers. Raises UserError where no list has as many modules as the config says there are layers."""
    count = model.config.num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(model).__name__} has no list of {count} decoder layers: use policy.method lora")


def linears_in(module: nn.Module) -> list[Any]:
    """The linear layers of a module."""
    return [part for part in module.modules() if isinstance(part, (nn.Linear, Conv1D))]


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


def undecayed_names(module: nn.Module) -> set[str]:
    """The names of the parameters that weight decay spares: biases, and those of normalisation layers."""
    names: set[str] = set()
    for path, part in module.named_modules():
        for name, _ in part.named_parameters(recurse=False):
            if is_undecayed(part, name):
                names.add(f"{path}.{name}" if path else name)
    return names


def is_undecayed(module: nn.Module, name: str) -> bool:
    """Whether weight decay spares a module's own parameter."""
    return "bias" in name or "Norm" in type(module).__name__


def names_ending_in(names: Iterable[str], endings: Sequence[str]) -> list[str]:
    """The dotted names whose last parts are one of the endings."""
    suffixes = tuple(f".{ending}" for ending in endings)
    return [name for name in names if f".{name}".endswith(suffixes)]


def find_targets(names: Iterable[str], targets: Sequence[str], model: PreTrainedModel) -> list[str]:
    """The layers that `policy.targets` names.

    Args:
        names: Names in the model of the layers that can be adapted.
        targets: The last parts of the names of those to adapt.
        model: The model, for messages.

    Raises:
        UserError: One of the targets is the name of no layer.
    """
    adaptable = list(names)
    for target in targets:
        if not names_ending_in(adaptable, [target]):
            known = sorted({name.rpartition(".")[2] for name in adaptable})
            raise UserError(
                f"policy.targets: no layer of {type(model).__name__} that can be adapted is named {target}; "
                f"there are {', '.join(known)}. {TRAIN_OUTSIDE}"
            )
    return names_ending_in(adaptable, targets)


def ia3_layers(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Names of the layers that (IA)³ scales: those of keys, values and the MLP's output; and of the MLP's alone."""
    names = linears(model)
    feedforward = names_ending_in(names, FEEDFORWARD_OUTPUTS)
    return names_ending_in(names, KEY_VALUE_PROJECTIONS) + feedforward, feedforward


def sublayer_outputs(model: PreTrainedModel, targets: str | Sequence[str] | None) -> list[tuple[nn.Module, str]]:
    """(parent module, name in it) of the last linear layers of attention and MLP, or of those that `targets` names.

    Raises UserError where no layer of the model has such a name.
    """
    layers = linears(model)
    if targets:
        names = find_targets(layers, [targets] if isinstance(targets, str) else targets, model)
    else:
        names = names_ending_in(layers, SUBLAYER_OUTPUTS)
    if not names:
        raise UserError(
            f"{type(model).__name__} has no layer named {' or '.join(SUBLAYER_OUTPUTS)}: set policy.targets"
        )
    outputs: list[tuple[nn.Module, str]] = []
    for full_name in names:
        parent, _, name = full_name.rpartition(".")
        outputs.append((model.get_submodule(parent), name))
    return outputs
