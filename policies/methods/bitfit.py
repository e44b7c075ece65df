"""BitFit: the biases alone.

Ben Zaken et al. 2022, "BitFit: simple parameter-efficient fine-tuning for transformer-based masked language-models".
"""

from policies.method_spec import YES, MethodSpec

SPEC = MethodSpec(
    name="bitfit",
    trains="biases; a base without any gets them at zero",
    source="Ben Zaken et al. 2022",
    trunk="policies.methods.bitfit_trunk:BitFitTrunk",
    peft_type="BITFIT",
    merges_at_export=True,
    scales=YES,
)
