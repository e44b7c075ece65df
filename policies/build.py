"""The trunk that the settings choose."""

from transformers import PreTrainedModel

from policies.files.base_model import load_base
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
