"""The names of settings in TRL, OpenRLHF, verl and Hugging Face libraries, for messages about unknown keys."""

FITTED = ("sft", "classify", "reward", "dpo")
"""The sections of the supervised stages, which have the settings of `FitSettings`."""


def _each(setting: str) -> tuple[str, ...]:
    """A setting of every supervised stage."""
    return tuple(f"{section}.{setting}" for section in FITTED)


BOTH_CLIPS = ("ppo.clip_low and ppo.clip_high",)
LEARNING_RATES = (
    "learner.policy_learning_rate and learner.critic_learning_rate",
    *_each("learning_rate"),
)
STEPS = ("ppo.steps", *_each("epochs"))
LENGTHS = (
    "rollouts.max_new_tokens and rollouts.max_prompt_tokens",
    *_each("max_tokens"),
)
EACH_STAGE = "settings of each stage: `sft`, `classify`, `reward`, `dpo`, `ppo`, `learner`"

FOREIGN_NAMES: dict[str, str | tuple[str, ...]] = {
    # Sections
    "trainer": EACH_STAGE,
    "training": EACH_STAGE,
    "train": EACH_STAGE,
    "generation": ("rollouts",),
    "sampling": ("rollouts",),
    "actor": "settings of the policy: `policy` (adapter), `learner` (optimizer) and `ppo` (loss)",
    "actor_rollout_ref": "in align these are sections of their own: `model`, `policy`, `rollouts`, `learner`, `ppo`",
    "algorithm": ("ppo",),
    "critic": "settings of the critic: `ppo.critic` and `learner.critic_learning_rate`",
    "wandb": ("tracking.wandb",),
    # Optimization
    "lr": LEARNING_RATES,
    "learning_rate": LEARNING_RATES,
    "critic.lr": ("learner.critic_learning_rate",),
    "critic.learning_rate": ("learner.critic_learning_rate",),
    "actor_learning_rate": ("learner.policy_learning_rate",),
    "critic_learning_rate": ("learner.critic_learning_rate",),
    "optim": ("learner.optimizer", *_each("optimizer")),
    "optimizer": ("learner.optimizer", *_each("optimizer")),
    "lr_scheduler_type": ("learner.schedule", *_each("schedule")),
    "lr_scheduler": ("learner.schedule", *_each("schedule")),
    "warmup_ratio": ("learner.warmup", *_each("warmup")),
    "lr_warmup_ratio": ("learner.warmup", *_each("warmup")),
    "lr_warmup_steps_ratio": ("learner.warmup", *_each("warmup")),
    "warmup_steps": "warmup is a share of the steps: set `learner.warmup`, `sft.warmup`, `reward.warmup` or "
    "`dpo.warmup`",
    "adam_eps": ("learner.adam_epsilon", *_each("adam_epsilon")),
    "adam_epsilon": ("learner.adam_epsilon", *_each("adam_epsilon")),
    "weight_decay": ("learner.weight_decay", *_each("weight_decay")),
    "l2": ("learner.weight_decay", *_each("weight_decay")),
    "max_grad_norm": ("learner.max_grad_norm", *_each("max_grad_norm")),
    "max_norm": ("learner.max_grad_norm", *_each("max_grad_norm")),
    "grad_clip": ("learner.max_grad_norm", *_each("max_grad_norm")),
    "gradient_checkpointing": ("model.gradient_checkpointing",),
    "enable_gradient_checkpointing": ("model.gradient_checkpointing",),
    "gradient_accumulation_steps": "a batch is split into microbatches by tokens: set "
    "`learner.tokens_per_microbatch`, `sft.tokens_per_microbatch` or `reward.tokens_per_microbatch`",
    # Batches, steps and epochs
    "num_train_epochs": (*_each("epochs"), "ppo.epochs"),
    "max_epochs": ("ppo.epochs", *_each("epochs")),
    "num_ppo_epochs": ("ppo.epochs",),
    "ppo_epochs": ("ppo.epochs",),
    "num_iterations": ("ppo.epochs",),
    "num_episodes": "the number of episodes is `ppo.steps` times `ppo.batch_size`",
    "total_episodes": "the number of episodes is `ppo.steps` times `ppo.batch_size`",
    "steps": STEPS,
    "max_steps": STEPS,
    "total_training_steps": STEPS,
    "total_epochs": ("ppo.steps",),
    "per_device_train_batch_size": "sizes are of whole batches over all ranks: set `ppo.batch_size`, `sft.batch_size` "
    "or `reward.batch_size`",
    "rollout_batch_size": "`ppo.batch_size` counts episodes: prompts times `ppo.samples_per_prompt`",
    "train_batch_size": "`ppo.batch_size` counts the episodes of a step; `ppo.minibatches` splits it for each epoch",
    "mini_batch_size": "set the number of minibatches per epoch, `ppo.minibatches`",
    "ppo_mini_batch_size": "set the number of minibatches per epoch, `ppo.minibatches`",
    "num_mini_batches": ("ppo.minibatches",),
    "micro_train_batch_size": "a microbatch is measured in tokens: set `learner.tokens_per_microbatch`",
    "ppo_micro_batch_size_per_gpu": "a microbatch is measured in tokens: set `learner.tokens_per_microbatch`",
    "ppo_max_token_len_per_gpu": ("learner.tokens_per_microbatch",),
    "micro_rollout_batch_size": ("rollouts.chunk_size",),
    "local_rollout_forward_batch_size": "a microbatch is measured in tokens: set `learner.tokens_per_microbatch`",
    # PPO
    "num_generations": ("ppo.samples_per_prompt",),
    "n_samples_per_prompt": ("ppo.samples_per_prompt",),
    "rloo_k": ("ppo.samples_per_prompt",),
    "rollouts.n": ("ppo.samples_per_prompt",),
    "advantage_estimator": ("ppo.estimator",),
    "adv_estimator": ("ppo.estimator",),
    "advantage": ("ppo.estimator",),
    "scale_rewards": "the estimator grpo always divides by the standard deviation of a prompt's rewards",
    "gamma": ("ppo.gamma",),
    "discount": ("ppo.gamma",),
    "lam": ("ppo.gae_lambda",),
    "lambd": ("ppo.gae_lambda",),
    "gae_lambda": ("ppo.gae_lambda",),
    "vf_coef": ("ppo.critic.coefficient",),
    "vf_coeff": ("ppo.critic.coefficient",),
    "value_coef": ("ppo.critic.coefficient",),
    "value_loss_coef": ("ppo.critic.coefficient",),
    "critic.coef": ("ppo.critic.coefficient",),
    "ppo.clip": BOTH_CLIPS,
    "cliprange": BOTH_CLIPS,
    "clip_range": BOTH_CLIPS,
    "clip_ratio": BOTH_CLIPS,
    "clip_eps": BOTH_CLIPS,
    "clip_epsilon": BOTH_CLIPS,
    "eps_clip": BOTH_CLIPS,
    "epsilon": BOTH_CLIPS,
    "cliprange_low": ("ppo.clip_low",),
    "clip_ratio_low": ("ppo.clip_low",),
    "cliprange_high": ("ppo.clip_high",),
    "clip_ratio_high": ("ppo.clip_high",),
    "epsilon_high": ("ppo.clip_high",),
    "clip_ratio_c": ("ppo.dual_clip",),
    "cliprange_value": ("ppo.critic.value_clip",),
    "value_clip": ("ppo.critic.value_clip",),
    "ent_coef": ("ppo.entropy_coefficient",),
    "entropy_coeff": ("ppo.entropy_coefficient",),
    "entropy_coef": ("ppo.entropy_coefficient",),
    "entropy_loss_coef": ("ppo.entropy_coefficient",),
    "ptx_coef": ("ppo.ptx_coefficient",),
    "loss_agg_mode": ("ppo.loss_aggregation",),
    "loss_type": ("ppo.loss_aggregation", "dpo.loss"),
    "tis_imp_ratio_cap": ("ppo.importance_ratio_cap",),
    "whiten_rewards": ("ppo.whiten_rewards",),
    "missing_eos_penalty": ("ppo.truncation_penalty",),
    "critic_warmup": ("ppo.critic.warmup",),
    "freezing_actor_steps": ("ppo.critic.warmup",),
    # KL
    "beta": ("ppo.kl.coefficient", "dpo.beta"),
    "simpo_gamma": ("dpo.margin",),
    "desirable_weight": ("dpo.desirable_weight",),
    "undesirable_weight": ("dpo.undesirable_weight",),
    "init_kl_coef": ("ppo.kl.coefficient",),
    "kl.coef": ("ppo.kl.coefficient",),
    "kl_coef": ("ppo.kl.coefficient",),
    "kl_loss_coef": ("ppo.kl.coefficient",),
    "kl_ctrl": ("ppo.kl.coefficient",),
    "use_kl_loss": ("ppo.kl.where",),
    "use_kl_in_reward": ("ppo.kl.where",),
    "kl_estimator": ("ppo.kl.estimator",),
    "kl.type": ("ppo.kl.estimator",),
    "kl_loss_type": ("ppo.kl.estimator",),
    "kl_penalty": ("ppo.kl.estimator",),
    "target_kl": "`ppo.kl.target` steers the adaptive KL coefficient; `ppo.target_kl` ends the epochs of a step early",
    "kl_target": ("ppo.kl.target",),
    "kl_horizon": ("ppo.kl.horizon",),
    "horizon": ("ppo.kl.horizon",),
    "adap_kl_ctrl": "set `ppo.kl.target` for an adaptive coefficient",
    # Generation
    "response_length": ("rollouts.max_new_tokens",),
    "max_completion_length": ("rollouts.max_new_tokens",),
    "max_new_tokens": ("rollouts.max_new_tokens",),
    "max_response_length": ("rollouts.max_new_tokens",),
    "generate_max_len": ("rollouts.max_new_tokens",),
    "prompt_max_len": ("rollouts.max_prompt_tokens",),
    "max_prompt_length": ("rollouts.max_prompt_tokens",),
    "temperature": ("rollouts.temperature", "evaluation.temperature"),
    "top_p": "responses are sampled from the model's whole distribution; its one setting is `rollouts.temperature`",
    "top_k": "responses are sampled from the model's whole distribution; its one setting is `rollouts.temperature`",
    "stop_strings": ("rollouts.stop",),
    "use_vllm": "set `rollouts.engine` to vllm",
    "vllm_num_engines": ("rollouts.workers",),
    "tensor_model_parallel_size": "an argument of vLLM: set it in `rollouts.vllm` as tensor_parallel_size",
    "vllm_tensor_parallel_size": "an argument of vLLM: set it in `rollouts.vllm` as tensor_parallel_size",
    "gpu_memory_utilization": "an argument of vLLM: set it in `rollouts.vllm`",
    "vllm_gpu_memory_utilization": "an argument of vLLM: set it in `rollouts.vllm` as gpu_memory_utilization",
    # Models and precision
    "model_name_or_path": ("model.path",),
    "pretrain": ("model.path",),
    "chat_template_path": ("model.chat_template",),
    "tokenizer_chat_template": ("model.chat_template",),
    "custom_chat_template": ("model.chat_template",),
    "ref_model": "the reference is the SFT model: set `sft.adapter`, or leave `sft` out of `stages` for the base model",
    "sft_model_path": ("sft.adapter",),
    "reward_model_path": ("reward.model", "reward.classifier"),
    "reward_pretrain": ("reward.model", "reward.classifier"),
    "center_rewards_coefficient": ("reward.centering",),
    "remote_rm_url": "add a term of kind endpoint to `reward.terms`",
    "reward_funcs": "add terms of kind function to `reward.terms`",
    "critic_pretrain": ("ppo.critic.model",),
    "bf16": "set `model.dtype` to bfloat16",
    "fp16": "training in float16 is not supported: set `model.dtype` to bfloat16, or leave it out",
    "torch_dtype": ("model.dtype",),
    "attn_implementation": "the attention kernel is chosen for the device",
    "flash_attn": "the attention kernel is chosen for the device",
    "zero_stage": ("learner.zero", *_each("zero")),
    "deepspeed": ("learner.zero", *_each("zero")),
    "actor_num_gpus_per_node": ("learner.ranks",),
    # Adapters
    "use_peft": ("policy.method",),
    "r": ("policy.rank",),
    "lora_r": ("policy.rank",),
    "lora_rank": ("policy.rank",),
    "lora_alpha": ("policy.alpha",),
    "lora_dropout": ("policy.dropout",),
    "vera_dropout": ("policy.dropout",),
    "init_r": ("policy.initial_rank",),
    "target_r": ("policy.rank",),
    "orth_reg_weight": ("policy.orthogonality",),
    "projection_prng_key": ("policy.projection_seed",),
    "decompose_factor": ("policy.kronecker_factor",),
    "oft_block_size": ("policy.block_size",),
    "target_modules": ("policy.targets",),
    "lora_target_modules": ("policy.targets",),
    "use_rslora": ("policy.rslora",),
    "use_dora": ("policy.dora",),
    "load_in_4bit": "set `policy.method` to qlora",
    "bnb_4bit_quant_type": ("policy.quant_type",),
    "num_virtual_tokens": ("policy.virtual_tokens",),
    # Data
    "packing": "sequences are always packed, without padding",
    "packing_samples": "sequences are always packed, without padding",
    "max_length": LENGTHS,
    "max_seq_length": _each("max_tokens"),
    "max_len": LENGTHS,
    "dataset": ("data.demonstrations", "data.preferences", "data.prompts"),
    "dataset_name": ("data.demonstrations", "data.preferences", "data.prompts"),
    "train_file": ("data.demonstrations", "data.preferences", "data.prompts"),
    "train_files": ("data.demonstrations", "data.preferences", "data.prompts"),
    "prompt_data": ("data.prompts",),
    "assistant_only_loss": ("sft.turns",),
    "completion_only_loss": "the loss is never over the prompt; `sft.turns` says which turns are trained",
    "train_on_inputs": "the loss is never over the prompt; `sft.turns` says which turns are trained",
    "split_special_tokens": ("data.special_tokens",),
    "eval_dataset": ("data.prompts_heldout", "data.preferences_heldout", "data.demonstrations_heldout"),
    # The run
    "seed": ("seed", "evaluation.seed"),
    "data_seed": ("seed",),
    "full_determinism": ("deterministic",),
    "output_dir": ("runs and name",),
    "save_path": ("runs and name",),
    "run_name": ("name",),
    "experiment_name": ("name",),
    "project_name": ("tracking.project",),
    "wandb_project": ("tracking.project",),
    "report_to": ("tracking.wandb",),
    "use_wandb": ("tracking.wandb",),
    "save_steps": ("checkpoint.every", *_each("checkpoint_every")),
    "save_freq": ("checkpoint.every", *_each("checkpoint_every")),
    "save_total_limit": ("checkpoint.keep",),
    "max_ckpt_num": ("checkpoint.keep",),
    "eval_steps": ("evaluation.every", *_each("evaluate_every")),
    "test_freq": ("evaluation.every", *_each("evaluate_every")),
    "logging_steps": "every step is logged",
    "local_rank": "ranks are Ray actors that align starts: set `learner.ranks`",
}
"""Another library's name, or its end with the sections around it: the settings of align that correspond to it, any of
which may be meant, or a hint. `a and b` are meant together. A message names only the settings that fit the section in
which the name was used, where there are any."""

RELATED_SECTIONS = {
    "ppo": ("learner", "rollouts"),
    "learner": ("ppo",),
    "policy": ("learner", "ppo"),
    "rollouts": ("ppo",),
}
"""Sections where a setting that was looked for in another section may be."""


def foreign_hint(keys: tuple[str, ...]) -> str | None:
    """What align calls an unknown key that another library has; the entry with the most sections around it applies."""
    for start in range(len(keys)):
        if target := FOREIGN_NAMES.get(".".join(keys[start:])):
            return target if isinstance(target, str) else f"align calls it {_alternatives(keys[0], target)}"
    return None


def _alternatives(section: str, settings: tuple[str, ...]) -> str:
    """The settings in the user's section; else those in sections related to it; else all."""
    fitting = _in_sections((section,), settings) or _in_sections(RELATED_SECTIONS.get(section, ()), settings)
    named = fitting or settings
    separator = ", or " if any(" and " in name for name in named) else " or "
    return separator.join(named)


def _in_sections(sections: tuple[str, ...], settings: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in settings if name.partition(".")[0] in sections)
