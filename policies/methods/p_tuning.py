"""P-tuning: virtual tokens that an encoder makes while SFT trains it.

Liu et al. 2021, "GPT understands, too".
"""

from policies.method_spec import MethodSpec

SPEC = MethodSpec(
    name="p_tuning",
    trains="embeddings of virtual tokens, made in SFT by an encoder that is then discarded; later stages train them",
    source="Liu et al. 2021",
    trunk="policies.methods.p_tuning_trunk:PTuningTrunk",
    reads=("virtual_tokens", "encoder", "encoder_width"),
    peft_type="P_TUNING",
    peft_config="policies.methods.p_tuning_trunk:saved_p_tuning_config",
    saved_settings={"virtual_tokens": "num_virtual_tokens"},
    prompt_kind="embeddings",
    below_float32=True,
)
