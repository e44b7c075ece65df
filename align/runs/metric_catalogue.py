"""Every metric that a run logs: its meaning, its unit, and the panel that shows it.

`python -m align.runs.metric_catalogue` prints docs/metrics.md. The report, the live page and the W&B dashboard have the
panels in common.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Metric:
    """A metric, or several of a kind.

    Attributes:
        name: Its name in `metrics.jsonl`; `*` stands for any text.
        meaning: What it is.
        unit: Its unit.
        condition: When it is logged; empty: always.
    """

    name: str
    meaning: str
    unit: str
    condition: str = ""


@dataclass(frozen=True)
class Panel:
    """Metrics of one unit in one figure.

    Attributes:
        name: What a file or an anchor is named after.
        title: What it shows.
        unit: The unit of its axis.
        metrics: The names of its metrics, as in the catalogue.
    """

    name: str
    title: str
    unit: str
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """Panels that answer one question.

    Attributes:
        name: What an anchor is named after.
        title: Its heading.
        question: The question.
        axis: The metric that its panels are plotted over, as W&B names it.
        panels: At most six panels.
    """

    name: str
    title: str
    question: str
    axis: str
    panels: tuple[Panel, ...]


NATS_PER_TOKEN = "nats per token"
NATS_PER_SEQUENCE = "nats per sequence"
WITH_GOLD = "with `evaluation.gold`"
WITH_CRITIC = "with a critic"
WITH_RULES = "with a verifiable term"
WITH_SAMPLES = "with a verifiable term and `evaluation.samples_per_prompt`"
WITH_ENSEMBLE = "with an ensemble of reward models"
AT_EVALUATIONS = "at evaluations"
WITH_CLASSES = "in classification"
WITH_NUMBERS = "in regression"


def _distribution(name: str, of: str, condition: str = "") -> tuple[Metric, ...]:
    """The metrics that describe a number per token, in units of the reward."""
    return (
        Metric(f"{name}_mean", f"{of}: mean", "score", condition),
        Metric(f"{name}_std", f"{of}: standard deviation", "score", condition),
        Metric(f"{name}_min", f"{of}: minimum", "score", condition),
        Metric(f"{name}_max", f"{of}: maximum", "score", condition),
    )


SFT = (
    Metric("sft/loss", "mean over the trained tokens of the batch", NATS_PER_TOKEN),
    Metric(
        "sft/heldout_loss",
        "the same on the held-out rows, without dropout and label smoothing",
        NATS_PER_TOKEN,
        AT_EVALUATIONS,
    ),
    Metric("sft/loss/*", "loss of one dataset of a mixture", NATS_PER_TOKEN, "with `data.mixture`"),
    Metric(
        "sft/heldout_loss/*",
        "held-out loss of one dataset of a mixture",
        NATS_PER_TOKEN,
        "with `data.mixture`, at evaluations",
    ),
    Metric("sft/learning_rate", "learning rate of this step", "number"),
    Metric(
        "sft/gradient_norm",
        "before clipping, over everything that is trained; null where it is not finite and the step is skipped",
        "number",
    ),
    Metric("sft/tokens_per_second", "tokens of the batch per second", "tokens per second"),
)
"""Metrics of SFT, one line per optimizer step."""

WITH_COMPARISONS = "with comparisons"
DPO = (
    Metric("dpo/loss", "mean over the preference examples of the batch", "nats per example"),
    Metric(
        "dpo/heldout_loss",
        "the same on the held-out rows, without dropout",
        "nats per example",
        AT_EVALUATIONS,
    ),
    Metric(
        "dpo/accuracy",
        "share of the batch's comparisons in which the reward of the better response is higher; equal ones count one "
        "half",
        "share",
        WITH_COMPARISONS,
    ),
    Metric("dpo/heldout_accuracy", "the same on the held-out rows", "share", AT_EVALUATIONS),
    Metric("dpo/margin", "mean difference of the rewards, better minus worse response", "nats", WITH_COMPARISONS),
    Metric(
        "dpo/chosen_reward",
        "reward of the better responses: β·log(π/π_ref); of simpo, β times the mean log-probability per token",
        "nats",
        WITH_COMPARISONS,
    ),
    Metric("dpo/rejected_reward", "the same of the worse responses", "nats", WITH_COMPARISONS),
    Metric(
        "dpo/chosen_logprob",
        "log-probability of the better responses under the policy",
        NATS_PER_SEQUENCE,
        WITH_COMPARISONS,
    ),
    Metric("dpo/learning_rate", "learning rate of this step", "number"),
    Metric(
        "dpo/gradient_norm",
        "before clipping, over everything that is trained; null where it is not finite and the step is skipped",
        "number",
    ),
    Metric("dpo/tokens_per_second", "tokens of the batch, prompts included, per second", "tokens per second"),
)
"""Metrics of preference optimisation, one line per optimizer step."""

CLASSIFIER = (
    Metric(
        "classifier/loss",
        "mean over the texts of the batch: cross-entropy in nats; or the squared error by the variance of the training "
        "labels",
        "loss per text",
    ),
    Metric(
        "classifier/heldout_loss", "the same on the held-out rows, without dropout", "loss per text", AT_EVALUATIONS
    ),
    Metric("classifier/accuracy", "share of the batch's texts whose class is right", "share", WITH_CLASSES),
    Metric("classifier/heldout_accuracy", "the same on the held-out rows", "share", f"at the end, {WITH_CLASSES}"),
    Metric(
        "classifier/heldout_f1_macro",
        "F1 on the held-out rows: mean over the classes",
        "share",
        f"at the end, {WITH_CLASSES}",
    ),
    Metric(
        "classifier/heldout_rmse",
        "root of the mean squared error on the held-out rows",
        "label",
        f"at the end, {WITH_NUMBERS}",
    ),
    Metric("classifier/heldout_mae", "mean absolute error on them", "label", f"at the end, {WITH_NUMBERS}"),
    Metric(
        "classifier/heldout_pearson",
        "Pearson's correlation of labels and predictions on them",
        "correlation",
        f"at the end, {WITH_NUMBERS}",
    ),
    Metric("classifier/heldout_spearman", "Spearman's", "correlation", f"at the end, {WITH_NUMBERS}"),
    Metric("classifier/learning_rate", "learning rate of this step", "number"),
    Metric(
        "classifier/gradient_norm",
        "before clipping, over everything that is trained; null where it is not finite and the step is skipped",
        "number",
    ),
    Metric("classifier/tokens_per_second", "tokens of the batch per second", "tokens per second"),
)
"""Metrics of a classifier's training, one line per optimizer step."""

REWARD_MODEL = (
    Metric(
        "reward_model/loss",
        "mean over the preference examples of the batch, or over its labelled steps",
        "nats per example",
    ),
    Metric(
        "reward_model/heldout_loss",
        "the same on the held-out rows, without dropout, label smoothing and centering",
        "nats per example",
        AT_EVALUATIONS,
    ),
    Metric(
        "reward_model/accuracy",
        "share of the batch's comparisons in the correct order, where equal scores count one half; ratings are not "
        "compared; or share of its labelled steps that are judged right",
        "share",
        "with preferences, or labels of steps from 0 to 1",
    ),
    Metric(
        "reward_model/margin", "mean difference of the scores, better minus worse response", "score", "with preferences"
    ),
    Metric(
        "reward_model/heldout_accuracy",
        "accuracy, on the held-out preferences or steps, of the model that the stage keeps",
        "share",
        "at the end",
    ),
    Metric("reward_model/learning_rate", "learning rate of this step", "number"),
    Metric(
        "reward_model/gradient_norm",
        "before clipping, over everything that is trained; null where it is not finite and the step is skipped",
        "number",
    ),
    Metric(
        "reward_model/tokens_per_second",
        "tokens of the batch, with one copy of the prompt per example, per second",
        "tokens per second",
    ),
)
"""Metrics of reward training, one line per optimizer step."""

PPO = (
    Metric("reward/mean", "scores of the step's responses, step rewards included: mean", "score"),
    Metric("reward/std", "their standard deviation", "score"),
    Metric("reward/histogram", "their distribution: `counts` in equal bins from `low` to `high`", "responses"),
    Metric(
        "reward/kl_penalized",
        "mean of the score less β times the KL to the reference, both per sequence: what RLHF maximises",
        "score",
    ),
    Metric("reward/term/*", "mean of a term of the reward", "score", "with `reward.terms`"),
    Metric("reward/term_std/*", "its standard deviation", "score", "with `reward.terms`"),
    Metric(
        "reward/steps/*",
        "mean total of a term's step rewards per response",
        "score",
        "with terms of kind `steps`, and of kind `process` unless `credit` is `minimum`",
    ),
    Metric("reward/step_count/*", "mean number of steps of a response", "number", "with a term of kind `process`"),
    Metric("reward/attribute/*", "mean of a named attribute of the reward model", "score", "with attributes"),
    Metric(
        "reward/failed/*", "share of responses that received the term's fallback", "share", "with terms that can fail"
    ),
    Metric(
        "reward/shortened/*",
        "share of prompts whose start a classifier does not read, because it has too few positions",
        "share",
        "with classifiers",
    ),
    Metric("reward/spread", "standard deviation between the members of an ensemble: mean", "score", WITH_ENSEMBLE),
    Metric("reward/multiplier", "λ of a constraint", "number", "with a constraint"),
    Metric(
        "reward/zero_std_share",
        "share of prompts whose responses all have the same score",
        "share",
        "with estimators that compare the samples of a prompt",
    ),
    Metric("reward/gold_mean", "true scores: mean", "gold score", WITH_GOLD),
    Metric("kl/per_sequence", "KL to the reference, the mean of k1 over the policy's own samples", NATS_PER_SEQUENCE),
    Metric("kl/per_token", "the same, by tokens", NATS_PER_TOKEN),
    Metric("kl/coefficient", "β at this step", "number"),
    Metric("kl/loss", "KL in the loss: mean over the trained tokens", NATS_PER_TOKEN),
    Metric("policy/loss", "policy loss: mean over the trained tokens", "number"),
    Metric("policy/clip_fraction", "share of tokens on the clipped branch of the policy loss", "share"),
    Metric("policy/approximate_kl", "k3 from the policy that sampled to the policy in training: mean", NATS_PER_TOKEN),
    Metric(
        "policy/ratio_mean",
        "probability of a token under the policy in training by that under the policy that sampled: mean",
        "ratio",
    ),
    Metric("policy/ratio_std", "the same: standard deviation", "ratio"),
    Metric("policy/ratio_max", "the same: maximum", "ratio"),
    Metric("policy/entropy", "entropy of the policy: mean", NATS_PER_TOKEN),
    Metric(
        "policy/ptx_loss", "loss of the demonstrations that are mixed in", NATS_PER_TOKEN, "with `ppo.ptx_coefficient`"
    ),
    Metric("policy/gradient_norm", "before clipping, mean over the step's updates", "number"),
    Metric("policy/learning_rate", "learning rate of the policy at this step", "number"),
    *_distribution("policy/advantage", "advantages of the response tokens, as they are trained on"),
    Metric("value/loss", "value loss: mean over the trained tokens", "number", WITH_CRITIC),
    Metric("value/clip_fraction", "share of tokens on the clipped branch of the value loss", "share", WITH_CRITIC),
    Metric(
        "value/explained_variance",
        "share of the variance of the returns that the values before the update explain",
        "share",
        WITH_CRITIC,
    ),
    Metric("value/gradient_norm", "before clipping, mean over the step's updates", "number", WITH_CRITIC),
    Metric("value/learning_rate", "learning rate of the critic at this step", "number", WITH_CRITIC),
    *_distribution("value/prediction", "the critic's values of the response tokens before the update", WITH_CRITIC),
    *_distribution("value/return", "targets of the critic, the returns", WITH_CRITIC),
    Metric("rollout/length_mean", "tokens per response: mean", "tokens"),
    Metric("rollout/length_histogram", "the same: distribution", "responses"),
    Metric("rollout/eos_share", "share of responses that ended by themselves", "share"),
    Metric("rollout/tokens", "tokens of the step's responses", "tokens"),
    Metric("rollout/prompt_tokens", "tokens of its prompts", "tokens"),
    Metric(
        "rollout/inserted_share",
        "share of the responses' tokens that the environment has inserted",
        "share",
        "at steps at which `rollouts.environment` has replied",
    ),
    Metric(
        "rollout/mismatch_mean",
        "absolute difference of the sampler's and the learner's log-probability of a token: mean",
        NATS_PER_TOKEN,
    ),
    Metric("rollout/mismatch_max", "the same: maximum", NATS_PER_TOKEN),
    Metric(
        "rollout/mismatch_share",
        "share of tokens for which they differ by more than 8 units in the last place of the logits "
        "([rollouts.md](rollouts.md#samplerlearner-mismatch))",
        "share",
    ),
    Metric("rollout/version", "version of the newest weights that sampled", "number"),
    Metric(
        "rollout/staleness",
        "number of updates by which a token's weights lag behind the learner's: mean",
        "updates",
    ),
    Metric("learner/optimizer_steps", "updates that were done", "updates"),
    Metric("learner/skipped_steps", "updates that were skipped because of a non-finite gradient", "updates"),
    Metric("time/rollout", "generating responses", "seconds"),
    Metric("time/score", "forward passes of the roles, and scores", "seconds"),
    Metric("time/update", "optimizer steps", "seconds"),
    Metric("time/sync", "sending weights to the workers", "seconds"),
    Metric("time/step", "the whole step", "seconds"),
    Metric("time/between", "since the previous step: logging, evaluation, checkpoints", "seconds"),
    Metric("perf/tokens_per_second", "tokens of prompts and responses by `time/step`", "tokens per second"),
    Metric("perf/episodes_per_second", "episodes by `time/step`", "episodes per second"),
    Metric(
        "perf/mfu",
        "model FLOPs utilization of the update: what its passes take at the peak of the GPUs, by `time/update`",
        "share",
        "on GPUs whose peak is known (policies/flops.py); not of mixtures of experts, nor with demonstrations mixed in",
    ),
    Metric(
        "perf/peak_memory/*",
        "the highest so far of a `controller`, `learner_rank` or `rollout_worker`: on a GPU, of torch's tensors; on a "
        "CPU, of resident memory above that before the stage",
        "bytes",
        "where the system tells it",
    ),
)
"""Metrics of PPO, one line per step."""

EVALUATION = (
    Metric("eval/score_mean", "score of the policy: mean", "score"),
    Metric("eval/score_std", "its standard deviation", "score"),
    Metric("eval/spread_mean", "standard deviation between the members of an ensemble: mean", "score", WITH_ENSEMBLE),
    Metric("eval/gold_mean", "true scores: mean", "gold score", WITH_GOLD),
    Metric(
        "eval/score_gain",
        "score of the policy less that of the reference on the same prompts: mean",
        "score",
    ),
    Metric("eval/score_gain_low", "the same: lower end of its 95 % interval", "score", "with several prompts"),
    Metric("eval/score_gain_high", "the same: upper end of its 95 % interval", "score", "with several prompts"),
    Metric("eval/gold_gain", "the same for the true scores", "gold score", WITH_GOLD),
    Metric("eval/gold_gain_low", "the same: lower end of its 95 % interval", "gold score", WITH_GOLD),
    Metric("eval/gold_gain_high", "the same: upper end of its 95 % interval", "gold score", WITH_GOLD),
    Metric(
        "eval/win_rate", "share of prompts on which the policy scores higher than the reference, ties one half", "share"
    ),
    Metric("eval/gold_win_rate", "the same by the true scores", "share", WITH_GOLD),
    Metric("eval/accuracy/*", "share of responses that a verifiable term finds right", "share", WITH_RULES),
    Metric("eval/accuracy_low/*", "the same: lower end of its 95 % interval", "share", WITH_RULES),
    Metric("eval/accuracy_high/*", "the same: upper end of its 95 % interval", "share", WITH_RULES),
    Metric("eval/accuracy_gain/*", "this share less the reference's on the same prompts", "share", WITH_RULES),
    Metric("eval/accuracy_gain_low/*", "the same: lower end of its 95 % interval", "share", WITH_RULES),
    Metric("eval/accuracy_gain_high/*", "the same: upper end of its 95 % interval", "share", WITH_RULES),
    Metric(
        "eval/pass_at_*",
        "chance that at least one of K samples is right, `pass_at_K/NAME`, and the ends of its 95 % interval, "
        "`pass_at_K_low/NAME` and `pass_at_K_high/NAME`",
        "share",
        WITH_SAMPLES,
    ),
    Metric("eval/kl_per_sequence", "KL to the reference", NATS_PER_SEQUENCE),
    Metric("eval/kl_per_token", "the same, by tokens", NATS_PER_TOKEN),
    Metric("eval/length_mean", "tokens per response: mean", "tokens"),
    Metric("eval/distinct_2", "distinct pairs of adjacent tokens, of all such pairs", "share"),
    Metric("eval/eos_share", "share of responses that ended by themselves", "share"),
)
"""Metrics of the policy on held-out prompts, at the steps of PPO that are evaluated."""

UPSTREAM = (
    Section(
        "sft",
        "Supervised fine-tuning",
        "Does the model learn the demonstrations without learning them by heart?",
        "sft/step",
        (
            Panel("sft-loss", "Loss", NATS_PER_TOKEN, ("sft/loss", "sft/heldout_loss")),
            Panel("sft-loss-by-dataset", "Loss by dataset", NATS_PER_TOKEN, ("sft/loss/*", "sft/heldout_loss/*")),
            Panel("sft-gradient", "Gradient norm", "number", ("sft/gradient_norm",)),
            Panel("sft-speed", "Throughput", "tokens per second", ("sft/tokens_per_second",)),
        ),
    ),
    Section(
        name="classifier",
        title="Classifier",
        question="Does it label texts that it has not seen?",
        axis="classifier/step",
        panels=(
            Panel("classifier-loss", "Loss", "loss per text", ("classifier/loss", "classifier/heldout_loss")),
            Panel(
                "classifier-accuracy",
                "Accuracy and F1",
                "share",
                ("classifier/accuracy", "classifier/heldout_accuracy", "classifier/heldout_f1_macro"),
            ),
            Panel(
                "classifier-error",
                "Error of the numbers",
                "label",
                ("classifier/heldout_rmse", "classifier/heldout_mae"),
            ),
            Panel(
                "classifier-correlation",
                "Correlation of labels and predictions",
                "correlation",
                ("classifier/heldout_pearson", "classifier/heldout_spearman"),
            ),
            Panel("classifier-gradient", "Gradient norm", "number", ("classifier/gradient_norm",)),
            Panel("classifier-speed", "Throughput", "tokens per second", ("classifier/tokens_per_second",)),
        ),
    ),
    Section(
        "reward-model",
        "Reward model",
        "Does it order responses as the annotators do?",
        "reward_model/step",
        (
            Panel("reward-model-loss", "Loss", "nats per example", ("reward_model/loss", "reward_model/heldout_loss")),
            Panel(
                "reward-model-accuracy", "Accuracy", "share", ("reward_model/accuracy", "reward_model/heldout_accuracy")
            ),
            Panel("reward-model-margin", "Margin between better and worse", "score", ("reward_model/margin",)),
            Panel("reward-model-gradient", "Gradient norm", "number", ("reward_model/gradient_norm",)),
            Panel("reward-model-speed", "Throughput", "tokens per second", ("reward_model/tokens_per_second",)),
        ),
    ),
    Section(
        "dpo",
        "Preference optimisation",
        "Does the policy tell good responses from bad ones, and does it still give the good ones their probability?",
        "dpo/step",
        (
            Panel("dpo-loss", "Loss", "nats per example", ("dpo/loss", "dpo/heldout_loss")),
            Panel("dpo-accuracy", "Accuracy", "share", ("dpo/accuracy", "dpo/heldout_accuracy")),
            Panel("dpo-rewards", "Rewards", "nats", ("dpo/margin", "dpo/chosen_reward", "dpo/rejected_reward")),
            Panel("dpo-chosen", "Log-probability of the better responses", NATS_PER_SEQUENCE, ("dpo/chosen_logprob",)),
            Panel("dpo-gradient", "Gradient norm", "number", ("dpo/gradient_norm",)),
            Panel("dpo-speed", "Throughput", "tokens per second", ("dpo/tokens_per_second",)),
        ),
    ),
)
"""The sections of the supervised stages."""

SECTIONS = (
    Section(
        "reward",
        "Reward",
        "Do responses get better, and not by the reward alone?",
        "ppo/step",
        (
            Panel("score", "Score", "score", ("reward/mean", "reward/kl_penalized", "eval/score_mean")),
            Panel("gold", "Gold score", "gold score", ("reward/gold_mean", "eval/gold_mean")),
            Panel("terms", "Terms of the reward", "score", ("reward/term/*", "reward/steps/*", "reward/attribute/*")),
            Panel("wins", "Wins over the reference", "share", ("eval/win_rate", "eval/gold_win_rate")),
            Panel("accuracy", "Right responses", "share", ("eval/accuracy/*",)),
            Panel("spread", "Spread of the scores", "score", ("reward/std", "reward/spread", "eval/spread_mean")),
        ),
    ),
    Section(
        "distance",
        "Distance from the reference",
        "How far has the policy moved, and how fast?",
        "ppo/step",
        (
            Panel("kl", "KL to the reference", NATS_PER_SEQUENCE, ("kl/per_sequence", "eval/kl_per_sequence")),
            Panel("coefficient", "KL coefficient β", "number", ("kl/coefficient", "reward/multiplier")),
            Panel("clipping", "Clipped tokens", "share", ("policy/clip_fraction", "value/clip_fraction")),
            Panel("update-kl", "KL of an update", NATS_PER_TOKEN, ("policy/approximate_kl",)),
            Panel("ratio", "Change of probabilities in an update", "ratio", ("policy/ratio_std",)),
            Panel("entropy", "Entropy of the policy", NATS_PER_TOKEN, ("policy/entropy",)),
        ),
    ),
    Section(
        "critic",
        "Critic and losses",
        "Does the critic know what a response is worth?",
        "ppo/step",
        (
            Panel("explained", "Explained variance", "share", ("value/explained_variance",)),
            Panel("value-loss", "Value loss", "number", ("value/loss",)),
            Panel("values", "Values and returns", "score", ("value/prediction_mean", "value/return_mean")),
            Panel("advantages", "Advantages", "score", ("policy/advantage_mean", "policy/advantage_std")),
            Panel("policy-loss", "Policy loss", "number", ("policy/loss", "kl/loss", "policy/ptx_loss")),
            Panel("gradients", "Gradient norms", "number", ("policy/gradient_norm", "value/gradient_norm")),
        ),
    ),
    Section(
        "text",
        "Text",
        "What do the responses look like?",
        "ppo/step",
        (
            Panel("length", "Response length", "tokens", ("rollout/length_mean", "eval/length_mean")),
            Panel("eos", "Responses that end by themselves", "share", ("rollout/eos_share", "eval/eos_share")),
            Panel("steps", "Steps of a response", "number", ("reward/step_count/*",)),
            Panel("distinct", "Distinct-2", "share", ("eval/distinct_2",)),
            Panel(
                "unscored",
                "Prompts without spread, scores that failed",
                "share",
                ("reward/zero_std_share", "reward/failed/*", "reward/shortened/*"),
            ),
            Panel(
                "mismatch",
                "Sampler–learner mismatch",
                NATS_PER_TOKEN,
                ("rollout/mismatch_mean", "rollout/mismatch_max"),
            ),
        ),
    ),
    Section(
        "machine",
        "Machine",
        "Where does the time go?",
        "ppo/step",
        (
            Panel(
                "time",
                "Time of a step",
                "seconds",
                ("time/rollout", "time/score", "time/update", "time/sync", "time/between"),
            ),
            Panel("throughput", "Throughput", "tokens per second", ("perf/tokens_per_second",)),
            Panel("mfu", "Model FLOPs utilization of the update", "share", ("perf/mfu",)),
            Panel("memory", "Peak memory by process", "bytes", ("perf/peak_memory/*",)),
            Panel("staleness", "Staleness of the weights that sampled", "updates", ("rollout/staleness",)),
            Panel("skipped", "Skipped updates", "updates", ("learner/skipped_steps",)),
        ),
    ),
)
"""The sections of PPO."""

WITHOUT_PANEL = {
    "policy/learning_rate": "it follows from the settings",
    "value/learning_rate": "it follows from the settings",
    "sft/learning_rate": "it follows from the settings",
    "classifier/learning_rate": "it follows from the settings",
    "reward_model/learning_rate": "it follows from the settings",
    "dpo/learning_rate": "it follows from the settings",
    "reward/histogram": "the report draws it for three steps, W&B and TensorBoard draw it by themselves",
    "rollout/length_histogram": "the report draws it for three steps, W&B and TensorBoard draw it by themselves",
    "reward/term_std/*": "it is for the rule that finds constant terms",
    "kl/per_token": "it is the KL per sequence by the length",
    "eval/kl_per_token": "it is the KL per sequence by the length",
    "eval/score_gain": "it is the score less that of the reference, which does not change",
    "eval/score_gain_low": "it is for the page's first screen and comparisons",
    "eval/score_gain_high": "it is for the page's first screen and comparisons",
    "eval/gold_gain": "it is the gold score less that of the reference, which does not change",
    "eval/gold_gain_low": "it is for the page's first screen and comparisons",
    "eval/gold_gain_high": "it is for the page's first screen and comparisons",
    "eval/accuracy_gain/*": "it is the accuracy less that of the reference, which does not change",
    "eval/accuracy_low/*": "it is for comparisons",
    "eval/accuracy_high/*": "it is for comparisons",
    "eval/accuracy_gain_low/*": "it is for comparisons",
    "eval/accuracy_gain_high/*": "it is for comparisons",
    "eval/pass_at_*": "it grows with the accuracy",
    "eval/score_std": "the spread in training shows the same",
    "rollout/tokens": "it is the length by the batch size",
    "rollout/prompt_tokens": "it depends on the prompts alone",
    "rollout/inserted_share": "it is of few runs, and the length shows it",
    "rollout/mismatch_share": "it is for the check of the sampler, which stops a run",
    "rollout/version": "it is the step, less the staleness",
    "learner/optimizer_steps": "it follows from the settings and the skipped updates",
    "time/step": "it is the sum of its parts",
    "perf/episodes_per_second": "it is the throughput by the length",
    "policy/ratio_mean": "its standard deviation tells more",
    "policy/ratio_max": "it is one token; the standard deviation tells more",
    "policy/advantage_min": "the standard deviation tells more",
    "policy/advantage_max": "the standard deviation tells more",
    "value/prediction_std": "the explained variance tells more",
    "value/prediction_min": "the explained variance tells more",
    "value/prediction_max": "the explained variance tells more",
    "value/return_std": "the explained variance tells more",
    "value/return_min": "the explained variance tells more",
    "value/return_max": "the explained variance tells more",
}
"""Metrics on no panel, and why."""


def all_metrics() -> tuple[Metric, ...]:
    """The whole catalogue."""
    return SFT + CLASSIFIER + REWARD_MODEL + DPO + PPO + EVALUATION


def find_metric(name: str) -> Metric | None:
    """The entry of the catalogue for a metric; None where there is none."""
    return next((metric for metric in all_metrics() if fnmatchcase(name, metric.name)), None)


def shown_in(panel: Panel, names: Sequence[str]) -> list[str]:
    """Those of some metrics that a panel shows, in its order."""
    shown = []
    for pattern in panel.metrics:
        shown += [name for name in names if fnmatchcase(name, pattern)]
    return shown


def metric_tables() -> str:
    """The text of docs/metrics.md."""
    return "\n".join(_document()) + "\n"


def _document() -> Iterator[str]:
    yield "# Metrics"
    yield ""
    yield "<!-- written by `python -m align.runs.metric_catalogue` -->"
    yield ""
    yield (
        "The same names stand in `metrics.jsonl`, in W&B and in the report. A `*` stands for any text. A value that is "
        "not finite is null in `metrics.jsonl`."
    )
    for title, metrics in (
        ("SFT", SFT),
        ("Classifier training", CLASSIFIER),
        ("Reward training", REWARD_MODEL),
        ("Preference optimisation", DPO),
        ("PPO", PPO),
        ("Evaluation during PPO", EVALUATION),
    ):
        yield ""
        yield f"## {title}"
        yield ""
        yield "| name | meaning | unit | logged |"
        yield "|---|---|---|---|"
        for metric in metrics:
            yield f"| `{metric.name}` | {metric.meaning} | {metric.unit} | {metric.condition or 'always'} |"


if __name__ == "__main__":
    print(metric_tables(), end="")
