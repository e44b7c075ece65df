"""The trunk that the settings choose."""

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from policies.files.base_model import load_base, load_model_config
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import Trunk


def make_trunk(base: PreTrainedModel, settings: PolicySettings, roles: tuple[str, ...]) -> Trunk:
    """Build the trunk of `policy.method` on a base model that is loaded already.

    Args:
        base: The base model; the trunk keeps it and changes its modules.
        settings: The adaptation method and its settings.
        roles: The roles that get an adapter.

    Raises:
        UserError: The method finds nothing to train in this model, or the model is not supported.
    """
    trunk_class: type[Trunk] = settings.spec.load_trunk()
    return trunk_class(base, settings, roles)


def build_trunk(model: ModelSettings, settings: PolicySettings, roles: tuple[str, ...]) -> Trunk:
    """Load the base model as the method needs it, and build the trunk of `policy.method` on it.

    Args:
        model: The base model.
        settings: The adaptation method and its settings.
        roles: The roles that get an adapter.

    Raises:
        UserError: The model cannot be loaded or is not supported, or the method finds nothing to train in it.
    """
    return make_trunk(load_base(model, settings), settings, roles)


def base_without_weights(model: ModelSettings, settings: PolicySettings) -> PreTrainedModel:
    """Make a base model on the meta device: its tensors have shapes and no memory. None is quantised.

    Args:
        model: The base model, of which only the configuration is read.
        settings: The adaptation method, on which the dtype may depend.

    Raises:
        UserError: The configuration cannot be read.
    """
    config = copy.deepcopy(load_model_config(model.path))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, model.dtype_for(settings)))


def trunk_without_weights(base: PreTrainedModel, settings: PolicySettings, roles: tuple[str, ...]) -> Trunk:
    """Build the trunk of `policy.method` on a base model without weights; arguments and errors as of `make_trunk`.

    It is as in training: gradients flow to the adapters, and quantised layers have PEFT's own forward passes.
    """
    with torch.device("meta"):
        trunk = make_trunk(base, settings, roles)
    trunk.train_only(*roles)
    if settings.spec.four_bits:
        trunk.use_module_forwards()
    return trunk
