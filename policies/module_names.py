"""Where things are in a model, whatever its family."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from policies.errors import UserError

KEYS_AND_VALUES = ("k_proj", "v_proj", "query_key_value", "c_attn", "qkv_proj")
SUBLAYER_OUTPUTS = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "fc2")
"""Last layers of attention and of the feed-forward part, as the families name them."""
FEEDFORWARD_OUTPUTS = ("down_proj", "mlp.c_proj", "dense_4h_to_h", "fc2")


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers. Raises UserError where there is no list of as many modules as the config names layers."""
    count = model.config.num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(model).__name__} has no list of {count} decoder layers: use policy.method lora")


def linears(model: PreTrainedModel) -> dict[str, Any]:
    """The linear layers of the decoder's layers, by name in the model."""
    inside = {id(module) for module in blocks(model).modules()}
    kinds = (nn.Linear, Conv1D)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and id(m) in inside}


def norms(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The normalisation layers, by name in the model."""
    return {n: m for n, m in model.named_modules() if "Norm" in type(m).__name__ and any(True for _ in m.parameters())}


def named_so(names: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """Those of the names whose last parts are one of those wanted."""
    return [name for name in names if any(f".{name}".endswith(f".{end}") for end in wanted)]


def keys_and_values(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Names of the layers that (IA)³ scales: those that make keys and values, and the last of the feed-forward part."""
    names = linears(model)
    feedforward = named_so(names, FEEDFORWARD_OUTPUTS)
    return named_so(names, KEYS_AND_VALUES) + feedforward, feedforward


def outputs_of_sublayers(model: PreTrainedModel, targets: str | Sequence[str] | None) -> list[tuple[nn.Module, str]]:
    """(parent, name in it) of the layers by which attention and feed-forward part end, or of those that targets name.

    Raises UserError where no layer of the model is named so.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets or SUBLAYER_OUTPUTS)
    found = named_so(linears(model), wanted)
    if not found:
        raise UserError(
            f"policy.targets: no linear layer of {type(model).__name__} is named {' or '.join(wanted)}; "
            f"it has {', '.join(sorted({name.rpartition('.')[2] for name in linears(model)}))}"
        )
    split = (name.rpartition(".") for name in found)
    return [(model.get_submodule(parent), name) for parent, _, name in split]
