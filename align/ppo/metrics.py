"""The metrics and samples of a PPO step."""

import math
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.algorithms.advantages import explained_variance, has_spread
from align.algorithms.episodes import shaped_score
from align.config.estimators import find_estimator
from align.config.ppo_settings import PpoSettings
from align.ppo.loop import Step
from align.ppo.mismatch import Mismatch, sampler_mismatch
from align.runs.histogram import Histogram, histogram_of, histogram_of_integers
from policies.text.tokenization import decode_response, prompt_text
from rollouts.trajectory import RoleOutputs, Trajectory, lengths


def step_metrics(step: Step, ppo: PpoSettings, gold: Sequence[float] | None) -> dict[str, float]:
    """Compute the metrics of a step.

    Args:
        step: The results of the step.
        ppo: The settings of PPO.
        gold: True scores of its responses; None where the experiment has none.

    Returns:
        The metrics, by their names in `metrics.jsonl`.
    """
    metrics = _reward_and_kl_metrics(step) | _policy_metrics(step) | _rollout_metrics(step)
    metrics["learner/optimizer_steps"] = step.statistics["optimizer_steps"]
    metrics["learner/skipped_steps"] = step.statistics["skipped_steps"]
    if ppo.has_critic:
        metrics |= _value_metrics(step)
    if find_estimator(ppo.estimator).min_samples > 1:
        metrics["reward/zero_std_share"] = zero_std_share(step.trajectories, step.scored, ppo)
    metrics |= _mean_notes(step)
    if ppo.ptx_coefficient:
        metrics["policy/ptx_loss"] = step.statistics["ptx_loss"]
    if gold is not None:
        metrics["reward/gold_mean"] = sum(gold) / len(gold)
    for part, seconds in step.seconds.items():
        metrics[f"time/{part}"] = seconds
    tokens = sum(trajectory.total_length for trajectory in step.trajectories)
    metrics["perf/tokens_per_second"] = tokens / step.seconds["step"]
    metrics["perf/episodes_per_second"] = len(step.trajectories) / step.seconds["step"]
    return metrics | _utilization(step)


def _utilization(step: Step) -> dict[str, float]:
    """Model FLOPs utilization of the update, where the peak of the GPUs is known."""
    at_peak = step.statistics["seconds_at_peak"]
    return {"perf/mfu": at_peak / step.seconds["update"]} if at_peak else {}


def _reward_and_kl_metrics(step: Step) -> dict[str, float]:
    scores = torch.tensor([output.score for output in step.scored])
    kl = torch.tensor([output.kl for output in step.scored], dtype=torch.float64)
    tokens = sum(trajectory.sampled_length for trajectory in step.trajectories)
    return {
        "reward/mean": float(scores.mean()),
        "reward/std": float(scores.std(correction=0)),
        "reward/kl_penalized": float((scores - step.kl_coefficient * kl).mean()),
        "kl/per_sequence": float(kl.mean()),
        "kl/per_token": float(kl.sum()) / tokens,
        "kl/coefficient": step.kl_coefficient,
        "kl/loss": step.statistics["kl_loss"],
    }


def step_histograms(step: Step) -> dict[str, Histogram]:
    """The distributions of a step's finite scores and of its lengths, by their names in `metrics.jsonl`."""
    tokens: list[int] = lengths(step.trajectories).tolist()
    histograms = {"rollout/length_histogram": histogram_of_integers(tokens)}
    if scores := [output.score for output in step.scored if math.isfinite(output.score)]:
        histograms["reward/histogram"] = histogram_of(scores)
    return histograms


def zero_std_share(trajectories: Sequence[Trajectory], scored: Sequence[RoleOutputs], ppo: PpoSettings) -> float:
    """Share of prompts whose responses all score alike, so that a group estimator learns nothing from them.

    Args:
        trajectories: The trajectories of a step; those of one prompt are adjacent.
        scored: Their role outputs, with the scores.
        ppo: The settings of PPO, with penalties for length and truncation, which count here, and the group size.
    """
    scores = []
    for trajectory, outputs in zip(trajectories, scored, strict=True):
        scores.append(shaped_score(outputs.score, trajectory.length, truncated=not trajectory.ended, ppo=ppo))
    groups = torch.tensor(scores, dtype=torch.float64).view(-1, ppo.samples_per_prompt)  # [prompts, K]
    return 1 - float(has_spread(groups).double().mean())


def _policy_metrics(step: Step) -> dict[str, float]:
    advantages = torch.cat([episode.of_policy(episode.advantages) for episode in step.episodes])
    return {
        "policy/loss": step.statistics["policy_loss"],
        "policy/clip_fraction": step.statistics["policy_clipped"],
        "policy/approximate_kl": step.statistics["approximate_kl"],
        "policy/entropy": step.statistics["entropy"],
        "policy/ratio_mean": 1 + step.statistics["ratio_change"],
        "policy/ratio_std": _standard_deviation(
            step.statistics["ratio_change"], step.statistics["squared_ratio_change"]
        ),
        "policy/ratio_max": step.statistics["ratio_max"],
        "policy/gradient_norm": step.statistics["policy_gradient_norm"],
        "policy/learning_rate": step.coefficients.policy_lr,
        **_distribution("policy/advantage", advantages),
    }


def _standard_deviation(mean: float, mean_square: float) -> float:
    return math.sqrt(max(0.0, mean_square - mean**2))


def _rollout_metrics(step: Step) -> dict[str, float]:
    tokens = lengths(step.trajectories)
    mismatch = sampler_mismatch(step.trajectories, step.scored)
    version_sum = sum(sum(trajectory.versions) for trajectory in step.trajectories)
    sampled = sum(trajectory.sampled_length for trajectory in step.trajectories)
    inserted = int(tokens.sum()) - sampled
    return {
        **({"rollout/inserted_share": inserted / int(tokens.sum())} if inserted else {}),
        "rollout/length_mean": float(tokens.double().mean()),
        "rollout/eos_share": sum(t.ended for t in step.trajectories) / len(step.trajectories),
        "rollout/tokens": int(tokens.sum()),
        "rollout/prompt_tokens": sum(len(t.request.prompt_ids) for t in step.trajectories),
        "rollout/mismatch_mean": float(mismatch.mean()),
        "rollout/mismatch_max": float(mismatch.max()),
        "rollout/mismatch_share": Mismatch.of(mismatch, step.logit_spacing).large_share,
        "rollout/version": max(trajectory.versions[-1] for trajectory in step.trajectories),
        "rollout/staleness": step.index - version_sum / int(tokens.sum()),
    }


def _value_metrics(step: Step) -> dict[str, float]:
    values = torch.cat([episode.of_policy(episode.old_values) for episode in step.episodes])
    returns = torch.cat([episode.of_policy(episode.returns) for episode in step.episodes])
    return {
        "value/loss": step.statistics["value_loss"],
        "value/clip_fraction": step.statistics["value_clipped"],
        "value/explained_variance": explained_variance(values, returns),
        "value/gradient_norm": step.statistics["critic_gradient_norm"],
        "value/learning_rate": step.coefficients.critic_lr,
        **_distribution("value/prediction", values),
        **_distribution("value/return", returns),
    }


def _distribution(name: str, values: Tensor) -> dict[str, float]:
    """Mean, standard deviation and extremes of one number per token."""
    return {
        f"{name}_mean": float(values.mean()),
        f"{name}_std": float(values.std(correction=0)),
        f"{name}_min": float(values.min()),
        f"{name}_max": float(values.max()),
    }


def _mean_notes(step: Step) -> dict[str, float]:
    """Means of the reward's terms, attributes and other notes over the batch, and the spread of the terms."""
    means = {}
    for name in step.scored[0].notes:
        values = [output.notes[name] for output in step.scored]
        means[f"reward/{name}"] = fmean(values)
        if name.startswith("term/"):
            means[f"reward/term_std/{name.removeprefix('term/')}"] = pstdev(values)
    return means


def step_samples(
    step: Step, tokenizer: PreTrainedTokenizerBase, count: int, gold: Sequence[float] | None
) -> list[dict[str, Any]]:
    """The first `count` episodes of a step as rows of `samples.jsonl`."""
    rows: list[dict[str, Any]] = []
    for trajectory, output in zip(step.trajectories[:count], step.scored, strict=False):
        row = {
            "prompt": prompt_text(trajectory.request.prompt),
            "response": decode_response(tokenizer, trajectory.response_ids),
            "score": output.score,
            **output.notes,
            **_rewarded_tokens(output),
            "kl": output.kl,
            "ended": trajectory.ended,
        }
        rows.append(row)
    if gold is not None:
        for row, score in zip(rows, gold, strict=False):
            row["gold"] = score
    return rows


def _rewarded_tokens(output: RoleOutputs) -> dict[str, list[tuple[int, float]]]:
    """The tokens of a response, from 0, with a step reward, and these; nothing where no term gives any."""
    if output.step_rewards is None:
        return {}
    tokens: list[int] = output.step_rewards.nonzero().flatten().tolist()
    return {"step_rewards": [(token, float(output.step_rewards[token])) for token in tokens]}
