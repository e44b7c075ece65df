"""VeRA: one pair of frozen random matrices for all linear layers, and trained scales of its rows.

Kopiczko et al. 2024, "VeRA: vector-based random matrix adaptation".
"""

from policies.method_spec import MethodSpec

SPEC = MethodSpec(
    name="vera",
    trains="scales of frozen random low-rank matrices, which all linear layers share",
    source="Kopiczko et al. 2024",
    trunk="policies.methods.vera_trunk:VeraTrunk",
    reads=("rank", "dropout", "targets", "projection_seed"),
    peft_type="VERA",
    peft_config="policies.methods.vera_trunk:saved_vera_config",
    saved_settings={"rank": "r", "projection_seed": "projection_prng_key"},
    below_float32=True,
    merges_at_export=True,
)
