"""From settings to a trunk: the base as the method wants it, and what the method trains of it."""

from transformers import PreTrainedModel

from policies.files.base_model import load_base
from policies.methods.full_trunk import FullTrunk
from policies.methods.partial_trunk import PartialTrunk
from policies.methods.soft_trunk import PrefixTrunk, SoftPromptTrunk
from policies.methods.tuned_trunk import BottleneckTrunk, LayerAdapterTrunk
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import Trunk

TRUNKS: dict[str, type[Trunk]] = {
    "lora": LayerAdapterTrunk,
    "qlora": LayerAdapterTrunk,
    "ia3": LayerAdapterTrunk,
    "bottleneck": BottleneckTrunk,
    "bitfit": PartialTrunk,
    "layer_norm": PartialTrunk,
    "top_layers": PartialTrunk,
    "feature": PartialTrunk,
    "prompt_tuning": SoftPromptTrunk,
    "p_tuning": SoftPromptTrunk,
    "prefix_tuning": PrefixTrunk,
    "full": FullTrunk,
}


def make_trunk(base: PreTrainedModel, settings: PolicySettings, roles: tuple[str, ...]) -> Trunk:
    """The trunk that `policy.method` asks for, on a base that is loaded."""
    return TRUNKS[settings.method](base, settings, roles)


def build_trunk(model: ModelSettings, settings: PolicySettings, roles: tuple[str, ...]) -> Trunk:
    """The trunk that `policy.method` asks for, its base loaded as the method wants it."""
    return make_trunk(load_base(model, settings), settings, roles)
