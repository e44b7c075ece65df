"""Full fine-tuning: every role is a complete model with all weights trained."""

from policies.method_spec import YES, MethodSpec

SPEC = MethodSpec(
    name="full",
    trains="a complete model",
    trunk="policies.methods.full_trunk:FullTrunk",
    shares_base=False,
    merges_at_export=True,
    scales=YES,
    zero3=YES,
)
