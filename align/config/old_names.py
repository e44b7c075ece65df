"""Renamed settings and values: the old names are refused with a message that gives the new ones."""

OLD_NAMES = {
    "rollouts.rows": "rollouts.max_num_seqs",
    "rollouts.chunk": "rollouts.chunk_size",
    "rollouts.max_age": "rollouts.max_staleness",
    "rollouts.stretch": "rollouts.segment_tokens",
    "rollouts.slow": "rollouts.straggler_factor",
    "ppo.batch": "ppo.batch_size",
    "ppo.samples": "ppo.samples_per_prompt",
    "ppo.lam": "ppo.gae_lambda",
    "ppo.average": "ppo.loss_aggregation",
    "ppo.importance_cap": "ppo.importance_ratio_cap",
    "ppo.max_gap": "ppo.max_mismatch",
    "ppo.cut": "ppo.on_truncation",
    "ppo.cut_penalty": "ppo.truncation_penalty",
    "ppo.entropy": "ppo.entropy_coefficient",
    "ppo.ptx": "ppo.ptx_coefficient",
    "sft.batch": "sft.batch_size",
    "sft.clip": "sft.max_grad_norm",
    "reward.batch": "reward.batch_size",
    "reward.clip": "reward.max_grad_norm",
    "learner.clip": "learner.max_grad_norm",
    "evaluation.styles": "evaluation.prompt_styles",
    "policy.start": "policy.init_text",
    "policy.four_bits": "policy.quant_type",
    "reward.terms.*.most": "reward.terms.*.max_tokens",
    "reward.terms.*.whole": "reward.terms.*.full_match",
    "reward.terms.*.batch": "reward.terms.*.batch_size",
}
"""Old key: new key. `*` is the name of a reward term."""

OLD_VALUES = {
    ("ppo.average", "tokens"): "token_mean",
    ("ppo.average", "sequences"): "sequence_mean",
    ("ppo.loss_aggregation", "tokens"): "token_mean",
    ("ppo.loss_aggregation", "sequences"): "sequence_mean",
    ("reward.ensemble.combine", "mean_less_deviation"): "mean_minus_std",
}
"""A key with one of its old values: the new value."""
