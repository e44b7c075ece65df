"""(IA)³: learned scales of keys, values and the hidden units of the MLP.

Liu et al. 2022, "Few-shot parameter-efficient fine-tuning is better and cheaper than in-context learning".
"""

from policies.method_spec import YES, MethodSpec

SPEC = MethodSpec(
    name="ia3",
    trains="scales of keys, values and the hidden units of the MLP",
    source="Liu et al. 2022",
    trunk="policies.methods.ia3_trunk:Ia3Trunk",
    reads=("targets",),
    peft_type="IA3",
    peft_config="policies.methods.ia3_trunk:saved_ia3_config",
    below_float32=True,
    merges_at_export=True,
    scales=YES,
)
