"""AdaLoRA: low-rank matrices as singular values and vectors, whose ranks SFT distributes over the layers.

Zhang et al. 2023, "Adaptive budget allocation for parameter-efficient fine-tuning". SFT starts with `initial_rank` in
every layer and sets the least important singular values to zero, until their average per layer is `rank`; later stages
train those that remain. The allocation is in `policies/layers/rank_allocation.py`.
"""

from policies.method_spec import MethodSpec

SPEC = MethodSpec(
    name="adalora",
    trains="singular values and vectors beside linear layers; SFT distributes the ranks over the layers",
    source="Zhang et al. 2023",
    trunk="policies.methods.adalora_trunk:AdaLoraTrunk",
    reads=(
        "rank",
        "alpha",
        "dropout",
        "targets",
        "initial_rank",
        "allocation_start",
        "allocation_end",
        "orthogonality",
    ),
    peft_type="ADALORA",
    peft_config="policies.methods.adalora_trunk:saved_adalora_config",
    saved_settings={"rank": "target_r", "full_initial_rank": "init_r", "alpha": "lora_alpha"},
    below_float32=True,
    merges_at_export=True,
    needs_sft="distributes its ranks over the layers in SFT",
    last_weights_only="has more ranks at earlier steps of SFT than at the end",
    zero_conflict="shards the gradients, of which policy.method adalora needs all to distribute its ranks: use 0",
)
