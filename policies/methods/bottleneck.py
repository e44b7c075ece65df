"""Bottleneck adapters: a small MLP after attention and after the MLP of each decoder layer.

Houlsby et al. 2019, "Parameter-efficient transfer learning for NLP". The layer is `policies/layers/bottleneck.py`.
"""

from policies.method_spec import YES, MethodSpec

SPEC = MethodSpec(
    name="bottleneck",
    trains="down-projection, non-linearity and up-projection behind attention and MLP",
    source="Houlsby et al. 2019",
    trunk="policies.methods.bottleneck_trunk:BottleneckTrunk",
    reads=("bottleneck", "activation", "targets"),
    peft_type="BOTTLENECK",
    saved_settings={"bottleneck": "bottleneck", "activation": "activation"},
    below_float32=True,
    zero3=YES,
)
