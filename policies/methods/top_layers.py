"""Fine-tuning of the last decoder layers, the final norm and the LM head; everything below stays frozen."""

from policies.method_spec import YES, MethodSpec

SPEC = MethodSpec(
    name="top_layers",
    trains="the last `layers` decoder layers, the final norm and the LM head",
    trunk="policies.methods.top_layers_trunk:TopLayersTrunk",
    reads=("layers",),
    peft_type="TOP_LAYERS",
    saved_settings={"layers": "layers"},
    merges_at_export=True,
    scales=YES,
)
