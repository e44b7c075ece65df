"""From settings to a trunk: the base as the method needs it, and what the method trains of it."""

from transformers import PreTrainedModel

from policies.files.base_model import load_base
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import Trunk


def make_trunk(base: PreTrainedModel, settings: PolicySettings, roles: tuple[str, ...]) -> Trunk:
    """The trunk of `policy.method` on a base that is loaded.

    Args:
        base: the model; the trunk keeps it and changes its modules.
        settings: of the method.
        roles: those that get an adapter.

    Raises:
        UserError: the method finds nothing to train in this model, or the model is not supported.
    """
    trunk_class: type[Trunk] = settings.spec.load_trunk()
    return trunk_class(base, settings, roles)


def build_trunk(model: ModelSettings, settings: PolicySettings, roles: tuple[str, ...]) -> Trunk:
    """The trunk of `policy.method`, its base loaded as the method needs it; as `make_trunk` otherwise.

    Raises:
        UserError: the model cannot be loaded, or as `make_trunk` does.
    """
    return make_trunk(load_base(model, settings), settings, roles)
