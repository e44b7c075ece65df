"""The settings of the stages and of what drives them. `align.config` puts them together with those of the packages."""

import math
from typing import Literal

from pydantic import Field, model_validator

from policies.schema import SELECTED, ModelSettings, PolicySettings, Schedule, Settings
from rewards.schema import FitSettings, RewardSettings
from rollouts.schema import LARGEST_RANK, RolloutSettings

Stage = Literal["sft", "reward", "ppo"]
STAGES: tuple[Stage, ...] = ("sft", "reward", "ppo")


class SourceSettings(Settings):
    """One source of rows. A bare string is short for `path`."""

    path: str | list[str] = Field(
        description="file (JSONL, JSON, CSV, Parquet), folder of such files, or a dataset's hub name; or a list of them"
    )
    columns: dict[str, str] = Field(default_factory=dict, description="our name of a column: its name in the data")
    split: str = Field("train", description="which split, for a hub name")
    limit: int | None = Field(None, ge=1, description="read only the first rows")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str | list) else value


class DataSettings(Settings):
    """Where the rows of each stage come from."""

    demonstrations: SourceSettings | None = Field(None, description="SFT: prompt + completion, messages, or text")
    preferences: SourceSettings | None = Field(None, description="reward: pairs, rankings, choices, ratings")
    preferences_heldout: SourceSettings | None = Field(None, description="what the reward model is judged by")
    prompts: SourceSettings | None = Field(None, description="PPO: prompt")
    prompts_heldout: SourceSettings | None = Field(None, description="prompts that reference and policy are judged by")
    heldout_share: float = Field(
        0.1, gt=0, lt=1, description="share set aside for judging where no held-out source is given"
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="stop at a bad row, or skip and count it")


class SftSettings(FitSettings):
    """Supervised fine-tuning on demonstrations."""

    adapter: str | None = Field(None, description="an adapter in PEFT layout to start from: used as it is, not trained")


class KlSettings(Settings):
    """The leash to the reference."""

    where: Literal["reward", "loss"] = "reward"
    estimator: Literal["k1", "k2", "k3"] = "k1"
    coefficient: float = Field(0.05, ge=0)
    target: float | None = Field(
        None,
        gt=0,
        description="nats a sequence that the adaptive controller steers to; unset: the coefficient is fixed",
    )
    horizon: int = Field(10_000, ge=1, description="episodes over which the adaptive controller acts")

    @model_validator(mode="after")
    def _has_a_gradient(self) -> "KlSettings":
        if self.where == "loss" and self.estimator == "k1":
            raise ValueError("k1 in the loss has a gradient of mean zero and would hold nothing: use k2 or k3")
        return self


class CriticSettings(Settings):
    """The value critic. It is not built where the estimator needs none."""

    kind: Literal["adapter", "head", "model"] = Field(
        "adapter",
        description="an adapter of its own on the trunk, a head on the policy's states, or a model of its own",
    )
    model: str | None = Field(
        None, description="folder or hub name of the base of a critic of kind model; unset: the policy's"
    )
    coefficient: float | None = Field(
        None, gt=0, description="weight of the value loss; unset: 1, and 0.1 where it shares the policy's weights"
    )
    value_clip: float | None = Field(0.2, gt=0, description="how far a value may move from the old one; unset: freely")
    warmup: int = Field(0, ge=0, description="first steps in which only the critic learns")

    @property
    def weight(self) -> float:
        """The coefficient in force."""
        return self.coefficient or (0.1 if self.kind == "head" else 1.0)

    @model_validator(mode="after")
    def _consistent(self) -> "CriticSettings":
        if self.model and self.kind != "model":
            raise ValueError(f"`model` is the base of a critic of kind `model`, and kind is `{self.kind}`")
        return self


class StopSettings(Settings):
    """A figure of each step at which PPO ends early. The policy is the best evaluated, as at any end."""

    metric: str = Field(description="a name in metrics.jsonl, as reward/spread, reward/gold_mean or kl/per_sequence")
    above: float | None = None
    below: float | None = None
    falls_by: float | None = Field(None, gt=0, description="under the highest value so far")
    patience: int = Field(1, ge=1, description="steps in a row that must be so")

    @model_validator(mode="after")
    def _says_when(self) -> "StopSettings":
        if self.above is None and self.below is None and self.falls_by is None:
            raise ValueError("one of above, below and falls_by was expected")
        return self


class PpoSettings(Settings):
    """Proximal policy optimization. Sizes are in episodes (one prompt with one response)."""

    steps: int = Field(50, ge=1, description="rounds of rollout and update")
    batch_size: int = Field(128, ge=1, description="episodes a step")
    samples_per_prompt: int = Field(1, ge=1, description="episodes a prompt; rloo and grpo compare those of one prompt")
    epochs: int = Field(2, ge=1, description="passes over the episodes of a step")
    minibatches: int = Field(4, ge=1, description="optimizer steps a pass")
    estimator: Literal["gae", "rloo", "grpo", "reinforce++"] = Field(
        "gae", description="of advantages; only gae has a critic"
    )
    gamma: float = Field(1.0, gt=0, le=1, description="discount a token, in gae and reinforce++")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="lambda of generalised advantage estimation")
    whiten_advantages: bool | None = Field(
        None, description="over the batch; unset: as the estimator's paper has it, so for gae and reinforce++"
    )
    whiten_rewards: bool = Field(False, description="scale the token rewards of a batch to deviation 1")
    loss_aggregation: Literal["token_mean", "sequence_mean"] = Field(
        "token_mean", description="losses are means over all tokens, or means over sequences of each one's mean"
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped at 1 - clip_low")
    clip_high: float = Field(0.2, gt=0, description="the ratio is clipped at 1 + clip_high")
    dual_clip: float | None = Field(
        None, gt=1, description="largest ratio that counts where the advantage is negative; unset: any"
    )
    entropy_coefficient: float = Field(0.0, ge=0, description="coefficient of the entropy bonus")
    importance_ratio_cap: float | None = Field(
        None, gt=0, description="weigh tokens by learner over sampler probability, at most so much; unset: do not"
    )
    max_mismatch: float | None = Field(
        None, gt=0, description="mean nats a token between sampler and learner at which the run stops"
    )
    ptx_coefficient: float = Field(
        0.0, ge=0, description="weight of the likelihood of demonstrations, mixed into each update"
    )
    target_kl: float | None = Field(
        None, gt=0, description="mean KL a token of new to old policy at which the passes over a batch end early"
    )
    on_truncation: Literal["score", "bootstrap"] = Field(
        "score", description="responses truncated at max_new_tokens: scored and terminal, or unscored and bootstrapped"
    )
    truncation_penalty: float = Field(
        0.0, ge=0, description="taken off the score of a truncated response (with on_truncation: score)"
    )
    length_penalty: float = Field(0.0, description="taken off the score for each response token; negative: a bonus")
    stop: StopSettings | None = Field(None, description="a rule that ends PPO early; unset: none")
    kl: KlSettings = KlSettings()
    critic: CriticSettings = CriticSettings()

    @property
    def has_critic(self) -> bool:
        """Whether a critic is built and trained."""
        return self.estimator == "gae"

    @property
    def active_critic(self) -> CriticSettings | None:
        """The settings of the critic that is built."""
        return self.critic if self.has_critic else None

    @property
    def whitens_advantages(self) -> bool:
        """Whether advantages are whitened over the batch."""
        return self.estimator in ("gae", "reinforce++") if self.whiten_advantages is None else self.whiten_advantages

    @model_validator(mode="after")
    def _consistent(self) -> "PpoSettings":
        for name in ("minibatches", "samples_per_prompt"):
            if self.batch_size % getattr(self, name):
                raise ValueError(f"{name} {getattr(self, name)} does not divide batch_size {self.batch_size}")
        if self.estimator in ("rloo", "grpo") and self.samples_per_prompt < 2:
            raise ValueError(f"{self.estimator} compares the samples of a prompt: set samples_per_prompt to 2 or more")
        if not self.has_critic and self.critic != CriticSettings():
            raise ValueError(f"{self.estimator} has no critic: remove `critic`")
        readers = {"gamma": ("gae", "reinforce++"), "gae_lambda": ("gae",)}
        for name, estimators in readers.items():
            default = type(self).model_fields[name].default
            if getattr(self, name) != default and self.estimator not in estimators:
                raise ValueError(f"{self.estimator} does not read {name}: remove it, or use {' or '.join(estimators)}")
        if self.on_truncation == "bootstrap" and not self.has_critic:
            raise ValueError(
                f"`on_truncation: bootstrap` needs a critic, and {self.estimator} has none: use `on_truncation: score`"
            )
        if self.on_truncation == "bootstrap" and self.truncation_penalty:
            raise ValueError(
                "truncation_penalty is taken off a score, which `on_truncation: bootstrap` does not give: remove one of them"
            )
        return self


class LearnerSettings(Settings):
    """The DeepSpeed learner that trains policy and critic together."""

    ranks: int = Field(0, ge=0, description="Ray actors, one a rank; 0: one rank in the controller's process")
    gpus: float = Field(0.0, ge=0, description="GPUs that each actor reserves of the Ray cluster")
    restarts: int = Field(
        3, ge=0, description="times that a run goes on by itself from its last checkpoint when a rank has died"
    )
    zero: Literal[0, 1, 2, 3] = Field(0, description="ZeRO stage")
    optimizer: Literal["adamw", "paged_adamw", "sgd"] = Field(
        "adamw", description="paged_adamw: by bitsandbytes, its state in the host's memory when the GPU's is full"
    )
    policy_learning_rate: float = Field(1e-4, ge=0)
    critic_learning_rate: float = Field(1e-4, ge=0)
    schedule: Schedule = Field("constant", description="how the rates go on from their peaks, as in transformers")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the steps in which the rate rises from zero")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(
        1.0, gt=0, description="largest norm of the gradient, of policy and of critic each by itself"
    )
    max_skipped: int = Field(
        3, ge=1, description="steps in a row with a gradient that is not finite, and is left out, at which PPO stops"
    )
    tokens_per_microbatch: int | None = Field(
        None,
        ge=1,
        description="tokens of one forward pass, padding too where there is any; unset: as the device likes it",
    )


class FewShotExample(Settings):
    """A prompt and what a good answer to it is."""

    prompt: str
    completion: str


class PromptStyleSettings(Settings):
    """A way to put the held-out prompts to the reference: what prompting alone can do."""

    system: str | None = Field(None, description="a system prompt")
    examples: list[FewShotExample] = Field(default_factory=list, description="answered before the prompt: few-shot")
    suffix: str = Field("", description="added to the prompt, as in ` Think step by step.`")


class EvaluationSettings(Settings):
    """How reference and policy are judged."""

    prompts: int = Field(256, ge=1, description="held-out prompts, one sample of each side a prompt")
    every: int = Field(0, ge=0, description="PPO steps between evaluations; 0: at the end only")
    best: Literal["score_mean", "gold_mean"] = Field(
        "score_mean",
        description="what the best policy is picked by, among the steps that were evaluated; where the reward learns "
        "(running moments, a constraint), score_mean keeps the last",
    )
    gold: str | None = Field(None, description="true score of a response: FILE.py:function or module:function")
    temperature: float | None = Field(
        None, ge=0, description="of the samples; 0: greedy; unset: that of the rollouts, at which alone KL is unbiased"
    )
    prompt_styles: dict[str, PromptStyleSettings] = Field(
        default_factory=dict, description="NAME: also judge the reference with the prompts put in this way"
    )
    best_of: int = Field(0, ge=0, description="also judge the best of so many reference samples; 0: not")
    seed: int = Field(1234, description="of the samples; the same in every run, so that runs compare")

    @model_validator(mode="after")
    def _has_gold(self) -> "EvaluationSettings":
        if self.best_of > 1 and self.temperature == 0:
            raise ValueError("best_of: greedy samples, of `temperature` 0, are all the same")
        if self.best == "gold_mean" and not self.gold:
            raise ValueError("`best: gold_mean` needs `gold`")
        return self


class CheckpointSettings(Settings):
    every: int = Field(10, ge=1, description="PPO steps between checkpoints")
    keep: int = Field(2, ge=1, description="how many of the last ones stay")


class TrackingSettings(Settings):
    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online where the user is logged in, offline otherwise"
    )
    project: str = "align"
    samples: int = Field(4, ge=0, description="episodes written to samples.jsonl a step")


class ClusterSettings(Settings):
    address: str | None = Field(None, description="a Ray cluster to join; unset: one of our own on this machine")
    threads: int | None = Field(
        None, ge=1, description="CPU threads of each process; unset: an even share of the cores"
    )


class Experiment(Settings):
    """All that a run needs to know."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's folder is runs/NAME")
    seed: int = Field(0, ge=0)
    deterministic: bool | None = Field(
        None,
        description="use only operations that give the same figures each time, bit for bit, on the same machine; "
        "unset: on CPUs yes, and on GPUs, where it is slower, no",
    )
    runs: str = Field("runs", description="the folder of all runs")
    stages: list[Stage] = Field(default_factory=lambda: list(STAGES), min_length=1)
    model: ModelSettings
    policy: PolicySettings = PolicySettings()
    data: DataSettings = DataSettings()
    sft: SftSettings = SftSettings()
    reward: RewardSettings = RewardSettings()
    rollouts: RolloutSettings = RolloutSettings()
    ppo: PpoSettings = PpoSettings()
    learner: LearnerSettings = LearnerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _trains_in_float32(self) -> "Experiment":
        method = self.policy.method
        if method in {"full", *SELECTED} and self.model.dtype != "float32":
            raise ValueError(
                f"policy.method {method} trains the weights themselves, which model.dtype {self.model.dtype} is too "
                "coarse for: use float32"
            )
        return self

    @model_validator(mode="after")
    def _rollouts_fit(self) -> "Experiment":
        rollouts, ppo = self.rollouts, self.ppo
        chunks = math.ceil(ppo.batch_size / rollouts.effective_chunk_size)
        if rollouts.workers > chunks:
            raise ValueError(
                f"rollouts.workers {rollouts.workers}: a batch of {ppo.batch_size} is {chunks} chunks of "
                f"{rollouts.effective_chunk_size} prompts, and some workers would idle: set rollouts.chunk_size to at most "
                f"{max(1, ppo.batch_size // rollouts.workers)}, or fewer workers"
            )
        plain = self.policy.method == "lora" and not self.policy.dora and self.policy.full_rank <= LARGEST_RANK
        if rollouts.engine == "vllm" and not plain:
            raise ValueError(
                f"rollouts.engine vllm swaps adapters of policy.method lora, without dora, of rank {LARGEST_RANK} at "
                "most; this policy is another: use engine transformers"
            )
        if self.deterministic and (rollouts.engine == "vllm" or rollouts.segment_tokens):
            what = "engine vllm, which batches as requests come" if rollouts.engine == "vllm" else "segment_tokens"
            raise ValueError(f"deterministic: no two runs are the same with rollouts.{what}: remove one of them")
        if rollouts.max_staleness and ppo.importance_ratio_cap is None:
            raise ValueError(
                "rollouts.max_staleness samples from older weights than are trained, which ppo.importance_ratio_cap corrects: set "
                "it, to 2.0 as is usual"
            )
        if rollouts.max_staleness and ppo.max_mismatch is not None:
            raise ValueError(
                "ppo.max_mismatch compares sampler and learner under the same weights, which rollouts.max_staleness lets differ: "
                "remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> "Experiment":
        method = self.policy.method
        plain = not self.policy.dora and self.policy.init == "zero"
        if self.learner.zero == 3 and not (method in ("lora", "bottleneck", "full") and plain):
            raise ValueError(
                f"learner.zero 3 shards weights by the layers that use them, which policy.method {method} as it is set "
                "does not allow: use learner.zero 0, 1 or 2, or policy.method bottleneck, full, or lora without dora "
                "and init"
            )
        if method == "prefix_tuning" and self.model.gradient_checkpointing:
            raise ValueError(
                "model.gradient_checkpointing recomputes layers without the cache that prefix_tuning's keys and values "
                "are in: turn it off, or use policy.method prompt_tuning"
            )
        decays: dict[str, FitSettings | LearnerSettings] = {
            "sft": self.sft,
            "reward": self.reward,
            "learner": self.learner,
        }
        if self.policy.init == "pissa":
            for name, settings in decays.items():
                if settings.weight_decay:
                    raise ValueError(f"policy.init pissa holds half of its matrices: set {name}.weight_decay to 0")
        return self
