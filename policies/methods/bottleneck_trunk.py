"""The trunk of bottleneck adapters."""

from collections.abc import Iterable

from transformers import PreTrainedModel

from policies.layers.bottleneck import Bottleneck, dense_bottleneck
from policies.methods.layer_adapter_trunk import LayerAdapterTrunk
from policies.module_names import sublayer_outputs


class BottleneckTrunk(LayerAdapterTrunk):
    """A trunk with bottleneck adapters after attention and after the MLP of each decoder layer."""

    def _wrap(self, base: PreTrainedModel) -> Iterable[Bottleneck]:
        for parent, name in sublayer_outputs(base, self.settings.targets):
            layer = dense_bottleneck(
                getattr(parent, name), self.width, self.settings.bottleneck, self.settings.activation, self.roles
            )
            setattr(parent, name, layer.to(base.device))
            yield layer
