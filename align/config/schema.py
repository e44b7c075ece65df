"""The settings of the stages, and `Experiment`, which holds all settings."""

import math
import os
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from align.config.classify_settings import ClassifySettings
from align.config.dpo_settings import DpoSettings
from align.config.judge_settings import JudgeSettings
from align.config.ppo_settings import PpoSettings
from align.config.stage import all_stages, stage_names
from align.runtime.ray_job import address_of_job
from policies.method_spec import supporting
from policies.schema import (
    ActorSettings,
    ModelSettings,
    OptimizerSettings,
    PolicySettings,
    Settings,
    SpecialTokens,
    unread_settings,
)
from rewards.schema import FitSettings, RewardSettings
from rollouts.schema import LARGEST_VLLM_RANK, RolloutSettings


class SourceSettings(Settings):
    """One source of rows. A string or a list of strings alone is short for `path`."""

    path: str | list[str] = Field(
        description="file (JSONL, JSON, CSV, Parquet; TXT, MD: a row), folder of such files, or dataset on the hub; "
        "or a list of these"
    )
    columns: dict[str, str] = Field(default_factory=dict, description="align's name of a column: its name in the data")
    subset: str | None = Field(None, description="configuration of a dataset on the hub, such as main of openai/gsm8k")
    split: str = Field("train", description="split of a dataset on the hub")
    limit: int | None = Field(None, ge=1, description="read only the first rows")
    form: str | None = Field(None, description="how rows are read, such as sharegpt; unset: recognised by columns")
    template: str | None = Field(
        None,
        description="what a text prompt becomes: a text with columns of the row in braces, such as "
        "`Question: {prompt} Answer:`; {{ and }} are braces",
    )

    @field_validator("template")
    @classmethod
    def _names_columns(cls, template: str | None) -> str | None:
        if template is not None and not columns_in(template):
            raise ValueError("it names no column in braces, so that all prompts would be alike")
        return template

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str | list) else value


def columns_in(template: str) -> list[str]:
    """The columns that a template names. Raises ValueError where it is not one."""
    names = []
    for _, name, form, conversion in Formatter().parse(template):
        if name is not None:
            if not name.isidentifier() or form or conversion:
                raise ValueError(f"{{{name}}} is not the name of a column alone")
            names.append(name)
    return names


class MixedSource(SourceSettings):
    """One of several datasets of demonstrations that SFT trains on together."""

    weight: float = Field(1.0, gt=0, description="its share of the examples is proportional to weight · size^(1/T)")
    heldout: SourceSettings | None = Field(
        None, description="evaluates the SFT model on this dataset; unset: a part of it, as data.heldout_share says"
    )


class DataSettings(Settings):
    """The data of each stage."""

    demonstrations: SourceSettings | None = Field(None, description="SFT: prompt + completion, messages, or text")
    demonstrations_heldout: SourceSettings | None = Field(None, description="evaluates the SFT model")
    mixture: dict[str, MixedSource] = Field(
        default_factory=dict,
        description="NAME: one of several datasets of demonstrations, in place of `demonstrations`",
    )
    mixture_temperature: float = Field(
        1.0, gt=0, description="T of the mixture: 1: datasets have the shares of their sizes; larger: more alike"
    )
    labels: SourceSettings | None = Field(None, description="classify: text or prompt, and label")
    labels_heldout: SourceSettings | None = Field(None, description="evaluates the classifier")
    preferences: SourceSettings | None = Field(None, description="reward: pairs, rankings, choices, ratings")
    preferences_heldout: SourceSettings | None = Field(None, description="evaluates the reward model")
    step_labels: SourceSettings | None = Field(
        None, description="reward, where reward.terms has one of kind process: prompt, steps and labels"
    )
    step_labels_heldout: SourceSettings | None = Field(None, description="evaluates the process reward model")
    prompts: SourceSettings | None = Field(None, description="PPO: prompt")
    prompts_heldout: SourceSettings | None = Field(None, description="evaluates the reference and the policy")
    heldout_share: float = Field(
        0.1, gt=0, lt=1, description="share held out for evaluation where no held-out source is set"
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="stop at an invalid row, or skip and count it")
    special_tokens: SpecialTokens = Field(
        "refuse",
        description="the text of a special token, such as </s>, inside a text: refuse the row; control: it is the "
        "special token, for prompts that a chat template has rendered before; text: it is plain text",
    )

    @model_validator(mode="after")
    def _one_kind_of_demonstrations(self) -> "DataSettings":
        if self.mixture and (self.demonstrations or self.demonstrations_heldout):
            raise ValueError("`mixture` takes the place of `demonstrations` and `demonstrations_heldout`: remove these")
        if self.mixture_temperature != 1.0 and not self.mixture:
            raise unread_settings("`mixture_temperature` has no effect without `mixture`", "mixture_temperature")
        for name in self.mixture:
            if not name.isidentifier():
                raise ValueError(f"mixture: {name!r} is not a valid name: letters, digits and _ were expected")
        return self


class SftSettings(FitSettings):
    """Supervised fine-tuning on demonstrations."""

    adapter: str | None = Field(None, description="an adapter in PEFT layout, used as is instead of training one")
    adapter_base: Literal["original", "residual"] = Field(
        "original",
        description="the base that sft.adapter is for: the original model; or residual, what PEFT's PiSSA, "
        "OLoRA, CorDA, LoftQ or LoRA-GA left of it, which model.path must then be",
    )

    @property
    def residual_base(self) -> bool:
        """Whether the base is what the initialisation of `adapter` left of the original model."""
        return self.adapter_base == "residual"

    @model_validator(mode="after")
    def _base_is_of_an_adapter(self) -> "SftSettings":
        if self.residual_base and self.adapter is None:
            raise ValueError("adapter_base: residual is for an adapter: set adapter, or remove adapter_base")
        return self

    turns: Literal["all", "last"] = Field(
        "all", description="the assistant's turns in `messages` that are trained; a `completion` is one turn"
    )
    truncate: Literal["start", "end", "split"] | None = Field(
        None,
        description="cut rows with more than max_tokens at their start or end, where trained tokens remain; or split "
        "plain `text` into pieces; unset: they are refused or skipped, depending on data.on_bad_row",
    )
    neftune_alpha: float = Field(
        0.0, ge=0, description="α of NEFTune, noise on the embeddings while training; 5 is usual; 0: none"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the labels that could be any token")


class LearnerSettings(OptimizerSettings, ActorSettings):
    """The DeepSpeed learner that trains policy and critic together."""

    ranks: int = Field(0, ge=0, description="Ray actors, one per rank; 0: one rank in the controller's process")
    gpus: Literal[0, 1] | None = Field(
        None, description="GPUs of each actor, 0 or 1; unset: 1 where the Ray cluster has GPUs"
    )
    restarts: int = Field(
        3,
        ge=0,
        description="how often a run resumes by itself after a rank has died before it has reached another checkpoint",
    )
    zero: Literal[0, 1, 2, 3] = Field(0, description="ZeRO stage")
    policy_learning_rate: float = Field(1e-4, ge=0, description="peak learning rate of the policy")
    critic_learning_rate: float = Field(1e-4, ge=0, description="peak learning rate of the critic")
    adam_epsilon: float = Field(1e-5, gt=0, description="ε of AdamW, as large as in PPO's reference implementations")
    max_grad_norm: float = Field(
        1.0, gt=0, description="largest norm of the gradient, for the policy and the critic separately"
    )
    max_skipped: int = Field(
        3, ge=1, description="PPO stops after this many consecutive steps skipped for a gradient that is not finite"
    )

    @field_validator("gpus", mode="before")
    @classmethod
    def _at_most_one_gpu(cls, gpus: Any) -> Any:
        if isinstance(gpus, int | float) and gpus not in (0, 1):
            raise ValueError("a rank computes on one GPU (1) or on CPUs (0), and NCCL refuses two ranks on one GPU")
        return gpus


class FewShotExample(Settings):
    """A prompt with a good response."""

    prompt: str
    completion: str


class RetrievalSettings(Settings):
    """Documents whose passages are put before a prompt: those that share the most telling words with it (BM25)."""

    documents: str = Field(description="file or folder of documents: text, Markdown, or rows with the column `text`")
    passages: int = Field(3, ge=1, description="passages before a prompt, at most")
    words: int = Field(100, ge=1, description="words of a passage, at most")


class PromptStyleSettings(Settings):
    """A prompting baseline: how the held-out prompts are given to the reference."""

    system: str | None = Field(None, description="a system prompt")
    examples: list[FewShotExample] = Field(default_factory=list, description="few-shot examples before the prompt")
    retrieval: RetrievalSettings | None = Field(None, description="documents to quote before the prompt")
    suffix: str = Field("", description="text after the prompt, such as ` Think step by step.`")
    answer_after: str | None = Field(
        None,
        min_length=1,
        description="text after which the answer begins, such as `Answer:`; what comes before its last occurrence in a "
        "response, such as a chain of thought, is not scored",
    )


class EvaluationSettings(Settings):
    """How the reference and the policy are evaluated."""

    prompts: int = Field(256, ge=1, description="held-out prompts; each side samples one response per prompt")
    every: int = Field(0, ge=0, description="PPO steps between evaluations; 0: only at the end")
    best: Literal["score_mean", "gold_mean"] = Field(
        "score_mean",
        description="metric that selects the best policy among the evaluated steps; where the reward itself changes "
        "(running moments, a constraint), score_mean keeps the last",
    )
    gold: str | None = Field(
        None, description="function with the true score of a response: FILE.py:function or module:function"
    )
    temperature: float | None = Field(
        None,
        ge=0,
        description="of the samples; 0: greedy; unset: that of the rollouts, the only one at which KL is unbiased",
    )
    prompt_styles: dict[str, PromptStyleSettings] = Field(
        default_factory=dict, description="NAME: a prompting baseline to evaluate too"
    )
    judge: JudgeSettings | None = Field(
        None, description="a language model that compares the responses of two runs, in `align eval --against`"
    )
    best_of: int = Field(0, ge=0, description="also evaluate the best of this many reference samples; 0: do not")
    samples_per_prompt: int = Field(
        1,
        ge=1,
        description="responses per held-out prompt, of each side, from which accuracy and pass@k are computed where a "
        "term of the reward is verifiable; all other figures are of the first one",
    )
    texts: dict[str, SourceSettings] = Field(
        default_factory=dict,
        description="NAME: texts, or demonstrations, whose perplexity under the base model and the product of each "
        "stage is measured at the end of the run",
    )
    window: int = Field(
        2048,
        ge=2,
        description="most tokens of a document that a model reads at a time to measure its perplexity; at most its "
        "context length",
    )
    seed: int = Field(1234, description="of the samples; the same in every run, so that runs can be compared")

    @model_validator(mode="after")
    def _has_gold(self) -> "EvaluationSettings":
        if self.best_of > 1 and self.temperature == 0:
            raise ValueError("best_of: greedy samples (`temperature: 0`) are all the same")
        if self.samples_per_prompt > 1 and self.temperature == 0:
            raise ValueError("samples_per_prompt: greedy samples (`temperature: 0`) are all the same")
        if self.best == "gold_mean" and not self.gold:
            raise ValueError("`best: gold_mean` needs `gold`")
        for name in self.texts:
            if not name.isidentifier():
                raise ValueError(f"texts: {name!r} is not a valid name: letters, digits and _ were expected")
        return self


class CheckpointSettings(Settings):
    """How often a checkpoint is written, how many are kept, and how long a run that is stopped may take."""

    every: int = Field(10, ge=1, description="PPO steps between checkpoints")
    minutes: float = Field(
        30.0, gt=0, description="in every stage, minutes after which a step that ends writes a checkpoint, too"
    )
    keep: int = Field(2, ge=1, description="how many of the latest checkpoints to keep")
    grace: float | None = Field(
        None,
        gt=0,
        le=86400,
        description="seconds after Ctrl-C or SIGTERM at which the run ends with its last checkpoint; unset: no limit",
    )


class TrackingSettings(Settings):
    """Where metrics and samples go besides the run's folder."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto",
        description="auto: online where the user is logged in and the server answers, offline otherwise",
    )
    project: str = Field("align", description="project in W&B")
    entity: str | None = Field(None, description="user or team in W&B whose project it is; unset: the user's default")
    group: str | None = Field(None, description="W&B shows runs of a group together, such as those of several seeds")
    tags: list[str] = Field([], description="tags of the run in W&B")
    notes: str | None = Field(None, description="what W&B shows as the description of the run")
    samples: int = Field(4, ge=0, description="episodes per step that are written to samples.jsonl")
    probes: int = Field(
        8,
        ge=0,
        description="held-out prompts whose responses, of reference and policy, are written to samples.jsonl at each "
        "evaluation; the prompts and the seeds stay the same",
    )
    samples_every: int = Field(
        10,
        ge=1,
        description="W&B's table of samples grows at each multiple of so many PPO steps, and at evaluations; 100 times "
        "at most",
    )
    texts: bool = Field(True, description="send prompts and responses to W&B; false: figures alone")
    artifacts: bool = Field(
        True,
        description="keep what the stages make, and evaluation.json, as artifacts in W&B; of a product of more than "
        "200 MB only names and checksums of its files, which stay where they are",
    )
    tensorboard: bool = Field(False, description="write the metrics to TensorBoard's event files, too, in tensorboard/")


class ClusterSettings(Settings):
    """The Ray cluster, and the CPU threads of each process."""

    address: str | None = Field(
        None,
        description="a Ray cluster to join, HOST:PORT, or auto: the one that this machine belongs to; unset: start one "
        "on this machine, but in a Ray job join the job's",
    )
    wait: float = Field(
        300.0, gt=0, description="seconds in which the cluster must have room for the run's actors, or the run ends"
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads per process; unset: OMP_NUM_THREADS where the run joins no cluster, or else an even "
        "share of the cores",
    )

    @property
    def address_to_join(self) -> str | None:
        """The cluster to join; None: one is started on this machine."""
        return self.address or address_of_job()

    @property
    def threads_of_environment(self) -> int | None:
        """What OMP_NUM_THREADS says; None on a cluster, where Ray sets it to 1 for its processes."""
        named = os.environ.get("OMP_NUM_THREADS", "")
        is_set = named.isdecimal() and int(named) > 0 and not self.address_to_join
        return int(named) if is_set else None


def _known_stage(name: str) -> str:
    if name not in stage_names():
        raise ValueError(f"expected one of {', '.join(stage_names())}")
    return name


class Experiment(Settings):
    """All settings of a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's folder is runs/NAME")
    seed: int = Field(0, ge=0, description="seed of all random draws of the run, except those of the evaluation")
    deterministic: bool | None = Field(
        None,
        description="use only operations that give the same results every time, bit for bit, on the same machine; "
        "unset: true for each process on a CPU, false on a GPU, where it is slower; without it, a GPU multiplies "
        "float32 in TF32",
    )
    runs: str = Field("runs", description="folder of all runs")
    stages: list[Annotated[str, AfterValidator(_known_stage)]] = Field(
        default_factory=lambda: [stage.name for stage in all_stages() if stage.default],
        min_length=1,
        description="the stages to run: sft, classify, reward, ppo, or any other in align/config/stages/",
    )
    model: ModelSettings
    policy: PolicySettings = PolicySettings()
    data: DataSettings = DataSettings()
    sft: SftSettings = SftSettings()
    classify: ClassifySettings = ClassifySettings()
    reward: RewardSettings = RewardSettings()
    dpo: DpoSettings = DpoSettings()
    rollouts: RolloutSettings = RolloutSettings()
    ppo: PpoSettings = PpoSettings()
    learner: LearnerSettings = LearnerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()
    cluster: ClusterSettings = ClusterSettings()

    def ranks_of(self, stage: FitSettings) -> int:
        """Number of ranks of a supervised stage; 0: one in the controller's process."""
        return self.learner.ranks if stage.ranks is None else stage.ranks

    def zero_of(self, stage: FitSettings) -> int:
        """The ZeRO stage of a supervised stage."""
        return self.learner.zero if stage.zero is None else stage.zero

    @model_validator(mode="after")
    def _trains_one_policy(self) -> "Experiment":
        if {"dpo", "ppo"} <= set(self.stages):
            raise ValueError(
                "stages: dpo and ppo each train a policy from the SFT model: choose one; PPO continues a policy of DPO "
                "in a run with sft.adapter=RUN/dpo"
            )
        return self

    @model_validator(mode="after")
    def _trains_in_float32(self) -> "Experiment":
        if self.model.dtype == "bfloat16" and not self.policy.spec.below_float32:
            raise ValueError(
                f"policy.method {self.policy.method} trains the weights themselves, which model.dtype "
                f"{self.model.dtype} is too coarse for: use float32 or auto"
            )
        return self

    @model_validator(mode="after")
    def _rollouts_fit(self) -> "Experiment":
        ppo = self.ppo
        rollouts = self.rollouts
        chunks = math.ceil(ppo.batch_size / rollouts.effective_chunk_size)
        if rollouts.workers > chunks:
            raise ValueError(
                f"rollouts.workers {rollouts.workers}: a batch of {ppo.batch_size} is {chunks} chunks of "
                f"{rollouts.effective_chunk_size} prompts, and some workers would be idle: set rollouts.chunk_size to "
                f"at most {max(1, ppo.batch_size // rollouts.workers)}, or fewer workers"
            )
        return self

    @model_validator(mode="after")
    def _vllm_fits(self) -> "Experiment":
        rollouts = self.rollouts
        fits = self.policy.spec.vllm.allows(self.policy) and self.policy.full_rank <= LARGEST_VLLM_RANK
        if rollouts.engine == "vllm" and not fits:
            raise ValueError(
                f"rollouts.engine vllm swaps adapters of policy.method {supporting('vllm')}, of rank "
                f"{LARGEST_VLLM_RANK} at most; this policy is another: use engine transformers"
            )
        return self

    @model_validator(mode="after")
    def _samples_are_verifiable(self) -> "Experiment":
        if self.evaluation.samples_per_prompt > 1 and not any(t.is_verifiable for t in self.reward.terms.values()):
            raise unread_settings(
                "evaluation.samples_per_prompt has no effect: accuracy and pass@k need a verifiable term in "
                "reward.terms, of kind exact, number, math, json or regex, or a function with `verifiable: true`",
                "evaluation.samples_per_prompt",
            )
        return self

    @model_validator(mode="after")
    def _is_deterministic(self) -> "Experiment":
        rollouts = self.rollouts
        if self.deterministic and (rollouts.engine == "vllm" or rollouts.segment_tokens):
            cause = "engine vllm, which batches requests as they arrive"
            if rollouts.engine != "vllm":
                cause = "segment_tokens"
            setting = "engine" if rollouts.engine == "vllm" else "segment_tokens"
            raise unread_settings(
                f"deterministic: no two runs are the same with rollouts.{cause}: remove one of the two",
                "deterministic",
                f"rollouts.{setting}",
            )
        return self

    @model_validator(mode="after")
    def _staleness_fits(self) -> "Experiment":
        ppo = self.ppo
        rollouts = self.rollouts
        if rollouts.max_staleness and ppo.importance_ratio_cap is None:
            raise ValueError(
                "rollouts.max_staleness samples from older weights than those being trained, which "
                "ppo.importance_ratio_cap corrects for: set it; 2.0 is usual"
            )
        if rollouts.max_staleness and ppo.max_mismatch is not None:
            raise unread_settings(
                "ppo.max_mismatch compares sampler and learner under the same weights, and rollouts.max_staleness lets "
                "them differ: remove one of the two",
                "ppo.max_mismatch",
                "rollouts.max_staleness",
            )
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> "Experiment":
        spec = self.policy.spec
        zeros = {
            "learner": self.learner.zero,
            "sft": self.sft.zero,
            "classify": self.classify.zero,
            "reward": self.reward.zero,
            "dpo": self.dpo.zero,
        }
        for name, zero in zeros.items():
            if zero and spec.zero_conflict:
                raise ValueError(f"{name}.zero {zero} {spec.zero_conflict}")
            if zero == 3 and not spec.zero3.allows(self.policy):
                raise ValueError(
                    f"{name}.zero 3 shards weights by the layers that use them, which policy.method {spec.name} as it "
                    f"is set does not allow: use {name}.zero 0, 1 or 2, or policy.method {supporting('zero3')}"
                )
        if spec.needs_sft and "sft" not in self.stages and self.sft.adapter is None:
            raise ValueError(f"policy.method {spec.name} {spec.needs_sft}: add sft to stages, or set sft.adapter")
        if spec.last_weights_only and self.sft.evaluate_every:
            raise unread_settings(
                f"sft.evaluate_every keeps the weights with the best held-out loss, but policy.method {spec.name} "
                f"{spec.last_weights_only}: remove it",
                "sft.evaluate_every",
            )
        if self.model.gradient_checkpointing and spec.checkpointing_conflict:
            raise ValueError(f"model.gradient_checkpointing {spec.checkpointing_conflict}")
        decays: dict[str, FitSettings | LearnerSettings] = {
            "sft": self.sft,
            "classify": self.classify,
            "reward": self.reward,
            "dpo": self.dpo,
            "learner": self.learner,
        }
        if self.policy.init == "pissa":
            for name, settings in decays.items():
                if settings.weight_decay:
                    raise ValueError(f"policy.init pissa holds half of its matrices: set {name}.weight_decay to 0")
        return self
