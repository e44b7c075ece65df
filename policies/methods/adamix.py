"""AdaMix: SFT trains mixtures of bottleneck adapters with random routing, and averages their weights.

Wang et al. 2022, "AdaMix: mixture-of-adaptations for parameter-efficient model tuning". In each step of SFT one of the
`experts` is drawn for each down-projection and one for each up-projection, twice, and the two predictions are drawn
together (`routed_logprobs` in `align/learner/likelihood.py`). Evaluation and all later stages use the average of
the experts, an ordinary bottleneck adapter, which the later stages train: samples and ratios of PPO need one policy.
"""

from policies.method_spec import YES, MethodSpec

SPEC = MethodSpec(
    name="adamix",
    trains="the same as `bottleneck`; SFT trains several with random routing, and averages them",
    source="Wang et al. 2022",
    trunk="policies.methods.adamix_trunk:AdaMixTrunk",
    reads=("bottleneck", "activation", "targets", "experts"),
    peft_type="BOTTLENECK",
    saved_settings={"bottleneck": "bottleneck", "activation": "activation"},
    below_float32=True,
    zero3=YES,
    sft_passes=2,
    needs_sft="mixes adapters in SFT, and averages them for later stages",
)
