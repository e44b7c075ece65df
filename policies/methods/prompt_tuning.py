"""Prompt tuning: embeddings of virtual tokens before the prompt.

Lester et al. 2021, "The power of scale for parameter-efficient prompt tuning". The trunk, in `soft_prompt_trunk.py`, is
also what p-tuning and prefix tuning build on.
"""

from policies.method_spec import MethodSpec

SPEC = MethodSpec(
    name="prompt_tuning",
    trains="embeddings of virtual tokens",
    source="Lester et al. 2021",
    trunk="policies.methods.soft_prompt_trunk:SoftPromptTrunk",
    reads=("virtual_tokens", "init_text"),
    peft_type="PROMPT_TUNING",
    peft_config="policies.methods.soft_prompt_trunk:saved_prompt_tuning_config",
    saved_settings={"virtual_tokens": "num_virtual_tokens"},
    prompt_kind="embeddings",
    below_float32=True,
)
