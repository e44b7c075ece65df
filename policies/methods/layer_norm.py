"""LayerNorm tuning: gains and biases of the normalisation layers.

Zhao et al. 2024, "Tuning LayerNorm in attention: towards efficient multi-modal LLM finetuning".
"""

from policies.method_spec import YES, MethodSpec

SPEC = MethodSpec(
    name="layer_norm",
    trains="gains and biases of the norms",
    source="Zhao et al. 2024",
    trunk="policies.methods.layer_norm_trunk:LayerNormTrunk",
    peft_type="LN_TUNING",
    peft_config="policies.methods.layer_norm_trunk:saved_layer_norm_config",
    merges_at_export=True,
    scales=YES,
)
