"""Compacter: bottleneck adapters whose weights are sums of Kronecker products with factors that all layers share.

Karimi Mahabadi et al. 2021, "Compacter: efficient low-rank hypercomplex adapter layers". The layer is
`policies/layers/phm.py`. With `targets` of the MLP alone this is the paper's Compacter++.
"""

from policies.method_spec import MethodSpec

SPEC = MethodSpec(
    name="compacter",
    trains="bottlenecks of Kronecker products, one factor of which all layers of a role share",
    source="Karimi Mahabadi et al. 2021",
    trunk="policies.methods.compacter_trunk:CompacterTrunk",
    reads=("bottleneck", "activation", "targets", "kronecker_terms", "kronecker_rank"),
    peft_type="COMPACTER",
    saved_settings={
        "bottleneck": "bottleneck",
        "activation": "activation",
        "kronecker_terms": "kronecker_terms",
        "kronecker_rank": "kronecker_rank",
    },
    below_float32=True,
)
