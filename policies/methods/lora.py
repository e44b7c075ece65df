"""LoRA: low-rank matrices beside the base's linear layers.

Hu et al. 2021, "LoRA: low-rank adaptation of large language models". Its variants are settings: `rslora` (Kalajdzievski
2023), `dora` (Liu et al. 2024), `init: pissa` (Meng et al. 2024; `policies/lora_init.py`) and `lora_plus` (Hayou et al.
2024). The trunk is in `lora_trunk.py`, the forward pass of a layer in `policies/layers/lora.py`.
"""

from policies.method_spec import MethodSpec, Support

LORA_SETTINGS = ("rank", "alpha", "dropout", "targets", "rslora", "dora", "init", "lora_plus")
LORA_SAVED_SETTINGS = {"full_rank": "r", "full_alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora"}

SPEC = MethodSpec(
    name="lora",
    trains="low-rank matrices beside linear layers",
    source="Hu et al. 2021; Kalajdzievski 2023; Liu et al. 2024; Meng et al. 2024; Hayou et al. 2024",
    trunk="policies.methods.lora_trunk:LoraTrunk",
    reads=LORA_SETTINGS,
    peft_type="LORA",
    peft_config="policies.methods.lora_trunk:saved_lora_config",
    saved_settings=LORA_SAVED_SETTINGS,
    below_float32=True,
    merges_for_sampling=Support(True, without=("dora",)),
    merges_at_export=True,
    scales=Support(True, without=("dora",)),
    is_low_rank=True,
    vllm=Support(True, without=("dora",)),
    zero3=Support(True, without=("dora", "init")),
)
