"""From settings to a trunk: the base as the method wants it, and what the method trains of it."""

from transformers import PreTrainedModel

from policies.files.base_model import load_base
from policies.methods.full_trunk import Copies
from policies.methods.partial_trunk import SelectedTrunk
from policies.methods.soft_trunk import PrefixTrunk, SoftTrunk
from policies.methods.tuned_trunk import BottleneckTrunk, TunedTrunk
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import Trunk

TRUNKS: dict[str, type[Trunk]] = {
    "lora": TunedTrunk,
    "qlora": TunedTrunk,
    "ia3": TunedTrunk,
    "bottleneck": BottleneckTrunk,
    "bitfit": SelectedTrunk,
    "layer_norm": SelectedTrunk,
    "top_layers": SelectedTrunk,
    "feature": SelectedTrunk,
    "prompt_tuning": SoftTrunk,
    "p_tuning": SoftTrunk,
    "prefix_tuning": PrefixTrunk,
    "full": Copies,
}


def make_trunk(base: PreTrainedModel, settings: PolicySettings, roles: tuple[str, ...]) -> Trunk:
    """The trunk that `policy.method` asks for, on a base that is loaded."""
    return TRUNKS[settings.method](base, settings, roles)


def build_trunk(model: ModelSettings, settings: PolicySettings, roles: tuple[str, ...]) -> Trunk:
    """The trunk that `policy.method` asks for, its base loaded as the method wants it."""
    return make_trunk(load_base(model, settings), settings, roles)
