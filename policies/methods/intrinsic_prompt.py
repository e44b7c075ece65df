"""Intrinsic prompt tuning: a soft prompt is a linear map of a vector of few dimensions, which alone is trained.

Qin et al. 2021, "Exploring universal intrinsic task subspace via prompt tuning". The paper's auto-encoder over the
prompts of many tasks is here the best linear one, the principal components of the prompts in a prompt table. Without a
table the directions are random (Li et al. 2018, "Measuring the intrinsic dimension of objective landscapes").
"""

from policies.method_spec import MethodSpec

SPEC = MethodSpec(
    name="intrinsic_prompt",
    trains="a vector of few dimensions, of which embeddings of virtual tokens are a linear map",
    source="Qin et al. 2021; Li et al. 2018",
    trunk="policies.methods.intrinsic_prompt_trunk:IntrinsicPromptTrunk",
    reads=("virtual_tokens", "init_text", "intrinsic_dimension", "subspace", "projection_seed"),
    peft_type="PROMPT_TUNING",
    peft_config="policies.methods.soft_prompt_trunk:saved_prompt_tuning_config",
    saved_settings={"virtual_tokens": "num_virtual_tokens"},
    prompt_kind="embeddings",
    below_float32=True,
)
