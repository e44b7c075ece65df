"""Prefix tuning: keys and values of virtual tokens in every layer.

Li and Liang 2021, "Prefix-tuning: optimizing continuous prompts for generation".
"""

from policies.method_spec import MethodSpec

SPEC = MethodSpec(
    name="prefix_tuning",
    trains="keys and values of virtual tokens in every layer",
    source="Li and Liang 2021",
    trunk="policies.methods.prefix_tuning_trunk:PrefixTuningTrunk",
    reads=("virtual_tokens", "init_text"),
    peft_type="PREFIX_TUNING",
    peft_config="policies.methods.prefix_tuning_trunk:saved_prefix_tuning_config",
    saved_settings={"virtual_tokens": "num_virtual_tokens"},
    prompt_kind="keys and values",
    below_float32=True,
    checkpointing_conflict="recomputes layers without the KV cache, which holds the keys and values of prefix_tuning: "
    "turn it off, or use policy.method prompt_tuning",
)
