"""Feature-based training: the LM head on a frozen base model; reward model and critic train their scalar head alone."""

from policies.method_spec import MethodSpec

SPEC = MethodSpec(
    name="feature",
    trains="the LM head; a reward model or critic its scalar head alone",
    trunk="policies.methods.feature_trunk:FeatureTrunk",
    peft_type="FEATURE",
    merges_at_export=True,
)
