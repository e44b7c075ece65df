"""LoKr: the change of each linear layer is a Kronecker product, whose second factor is of low rank.

Edalati et al. 2022, "KronA: parameter efficient tuning with Kronecker adapter"; with a second factor of low rank Yeh et
al. 2024, "Navigating text-to-image customization: from LyCORIS fine-tuning to model evaluation". With a `rank` of at
least half the longer side of the second factor, that factor is a complete matrix: this is KronA.
"""

from policies.method_spec import MethodSpec

SPEC = MethodSpec(
    name="lokr",
    trains="Kronecker products beside linear layers; KronA where `rank` is high",
    source="Edalati et al. 2022; Yeh et al. 2024",
    trunk="policies.methods.lokr_trunk:LokrTrunk",
    reads=("rank", "alpha", "targets", "kronecker_factor"),
    peft_type="LOKR",
    peft_config="policies.methods.lokr_trunk:saved_lokr_config",
    saved_settings={"rank": "r", "alpha": "alpha", "kronecker_factor": "decompose_factor"},
    below_float32=True,
    merges_at_export=True,
)
