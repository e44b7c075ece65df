"""What is logged of a PPO step."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from align.algorithms.advantages import explained_variance
from align.config.schema import PpoSettings
from align.ppo.loop import Step
from align.ppo.mismatch import sampler_mismatch
from policies.text.tokenization import decode_response, prompt_text
from rollouts.trajectory import lengths

WIDE = 0.1
"""Nats beyond which sampler and learner are said to differ about a token."""


def step_metrics(step: Step, ppo: PpoSettings, gold: Sequence[float] | None) -> dict[str, float]:
    """The step's figures by their names in `metrics.jsonl`."""
    scores = torch.tensor([output.score for output in step.scored])
    kl = torch.tensor([output.kl for output in step.scored], dtype=torch.float64)
    tokens = lengths(step.trajectories)
    gaps = sampler_mismatch(step.trajectories, step.scored)
    versions = [version for trajectory in step.trajectories for version in trajectory.versions]
    of = step.statistics
    metrics = {
        "reward/mean": float(scores.mean()),
        "reward/std": float(scores.std(correction=0)),
        "kl/per_sequence": float(kl.mean()),
        "kl/per_token": float(kl.sum()) / int(tokens.sum()),
        "kl/coefficient": step.kl_coefficient,
        "kl/loss": of["kl_loss"],
        "policy/loss": of["policy_loss"],
        "policy/clip_fraction": of["policy_clipped"],
        "policy/approximate_kl": of["approximate_kl"],
        "policy/entropy": of["entropy"],
        "policy/gradient_norm": of["policy_gradient_norm"],
        "policy/learning_rate": step.coefficients.policy_lr,
        "rollout/length_mean": float(tokens.double().mean()),
        "rollout/eos_share": sum(t.ended for t in step.trajectories) / len(step.trajectories),
        "rollout/tokens": int(tokens.sum()),
        "rollout/prompt_tokens": sum(len(t.request.prompt_ids) for t in step.trajectories),
        "rollout/mismatch_mean": float(gaps.mean()),
        "rollout/mismatch_max": float(gaps.max()),
        "rollout/mismatch_share": float((gaps > WIDE).double().mean()),
        "rollout/version": max(versions),
        "rollout/staleness": step.index - fmean(versions),
        "learner/optimizer_steps": of["optimizer_steps"],
        "learner/skipped_steps": of["skipped_steps"],
    }
    if ppo.has_critic:
        metrics |= _value_metrics(step)
    metrics |= _notes(step)
    if ppo.ptx_coefficient:
        metrics["policy/ptx_loss"] = of["ptx_loss"]
    if gold is not None:
        metrics["reward/gold_mean"] = sum(gold) / len(gold)
    return metrics | {f"time/{part}": seconds for part, seconds in step.seconds.items()}


def _value_metrics(step: Step) -> dict[str, float]:
    values = torch.cat([episode.old_values for episode in step.episodes])
    returns = torch.cat([episode.returns for episode in step.episodes])
    of = step.statistics
    return {
        "value/loss": of["value_loss"],
        "value/clip_fraction": of["value_clipped"],
        "value/explained_variance": explained_variance(values, returns),
        "value/gradient_norm": of["critic_gradient_norm"],
        "value/learning_rate": step.coefficients.critic_lr,
    }


def _notes(step: Step) -> dict[str, float]:
    """The mean of each of the reward's terms, attributes, and what else is known of it."""
    names = step.scored[0].notes
    return {f"reward/{name}": fmean(output.notes[name] for output in step.scored) for name in names}


def step_samples(
    step: Step, tokenizer: PreTrainedTokenizerBase, count: int, gold: Sequence[float] | None
) -> list[dict[str, Any]]:
    """The first episodes of a step as rows of `samples.jsonl`."""
    rows = [
        {
            "prompt": prompt_text(trajectory.request.prompt),
            "response": decode_response(tokenizer, trajectory.response_ids),
            "score": output.score,
            **output.notes,
            "kl": output.kl,
            "ended": trajectory.ended,
        }
        for trajectory, output in zip(step.trajectories[:count], step.scored, strict=False)
    ]
    return rows if gold is None else [row | {"gold": score} for row, score in zip(rows, gold, strict=False)]
