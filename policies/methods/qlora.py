"""QLoRA: LoRA on linear layers that are quantised to four bits.

Dettmers et al. 2023, "QLoRA: efficient finetuning of quantized LLMs". See `policies/files/quantization.py`;
`init: loftq` (Li et al. 2023) is in `policies/lora_init.py`.
"""

from policies.method_spec import MethodSpec, Support
from policies.methods.lora import LORA_SAVED_SETTINGS, LORA_SETTINGS

SPEC = MethodSpec(
    name="qlora",
    trains="the same as `lora`, beside linear layers in four bits",
    source="Dettmers et al. 2023; Li et al. 2023",
    trunk="policies.methods.lora_trunk:LoraTrunk",
    reads=(*LORA_SETTINGS, "quant_type", "double_quantization"),
    peft_type="LORA",
    peft_config="policies.methods.lora_trunk:saved_lora_config",
    saved_settings=LORA_SAVED_SETTINGS,
    four_bits=True,
    below_float32=True,
    merges_at_export=True,
    scales=Support(True, without=("dora",)),
    is_low_rank=True,
)
