"""Compares the policy with the reference on held-out prompts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.config.schema import Experiment
from align.evaluation.intervals import with_interval
from align.evaluation.prompt_styles import PromptStyle
from align.evaluation.rules import accuracy_gains, powers_of_two_to, rule_figures
from align.runtime.seeds import seed_for
from align.scoring.build import Scorers
from align.scoring.reward import RIGHT_NOTE, EvaluationScorer, GoldScorer, Rescore, RoleScorer
from policies.text.encoder import TextEncoder
from policies.text.tokenization import decode_response, prompt_text
from policies.trunk import AdapterWeights
from rewards.losses import pair_accuracy
from rollouts.engine import Sampling
from rollouts.pool import Pool
from rollouts.trajectory import Request, RoleOutputs, Trajectory, lengths

REFERENCE_VERSION = -1
"""The version of the reference in the pool while it is sampled; the policy's versions count from 0."""


@dataclass(frozen=True)
class ScoredSamples:
    """One model's responses to the held-out prompts, one per prompt, with their scores."""

    trajectories: list[Trajectory]
    outputs: list[RoleOutputs]
    gold: Tensor | None

    @property
    def scores(self) -> Tensor:
        """The reward's scores `[prompts]`."""
        return torch.tensor([output.score for output in self.outputs])

    def right(self) -> dict[str, Tensor]:
        """Whether each response is right, 1 or 0, by verifiable term: `[prompts]` float64."""
        names = [name for name in self.outputs[0].notes if name.startswith(RIGHT_NOTE)]
        return {name.removeprefix(RIGHT_NOTE): self._notes(name) for name in names}

    def _notes(self, name: str) -> Tensor:
        return torch.tensor([output.notes[name] for output in self.outputs], dtype=torch.float64)

    def figures(self) -> dict[str, float]:
        """The figures of `evaluation.json` that policy and reference both have."""
        figures = {
            "score_mean": float(self.scores.mean()),
            "score_std": float(self.scores.std(correction=0)),
            "length_mean": float(lengths(self.trajectories).double().mean()),
            "distinct_2": distinct_2([t.response_ids for t in self.trajectories]),
            "eos_share": sum(t.ended for t in self.trajectories) / len(self.trajectories),
        }
        if "spread" in self.outputs[0].notes:
            figures["spread_mean"] = fmean(output.notes["spread"] for output in self.outputs)
        if self.gold is not None:
            figures["gold_mean"] = float(self.gold.mean())
        return figures

    def rows(self, tokenizer: PreTrainedTokenizerBase, name: str, count: int) -> list[dict[str, Any]]:
        """The text, score, length and gold score of the first `count` responses, under keys that begin with a name."""
        rows: list[dict[str, Any]] = []
        for trajectory, output in zip(self.trajectories[:count], self.outputs, strict=False):
            text = decode_response(tokenizer, trajectory.response_ids)
            rows.append({name: text, f"{name}_score": output.score, f"{name}_length": trajectory.length})
        if self.gold is not None:
            for row, gold in zip(rows, self.gold.tolist(), strict=False):
                row[f"{name}_gold"] = gold
        return rows


@dataclass(frozen=True)
class Samples:
    """One model's responses, which the reward can score again after its composition has changed."""

    trajectories: list[Trajectory]
    rescore: Rescore
    gold: Tensor | None

    def score(self) -> ScoredSamples:
        """The responses, with their current scores."""
        return ScoredSamples(self.trajectories, self.rescore(), self.gold)


@dataclass(frozen=True)
class EvaluationScorers:
    """The scorers of an evaluation.

    Attributes:
        policy: Scores the policy's responses, and computes their KL to the reference.
        reference: Scores responses alone: those of the reference, and further samples of the policy.
        gold: The true score; None where the experiment has none.
    """

    policy: EvaluationScorer
    reference: EvaluationScorer
    gold: GoldScorer | None = None


@dataclass(frozen=True)
class HeldoutPlan:
    """What an evaluation samples.

    Attributes:
        prompts: The held-out prompts.
        sampling: How responses are sampled.
        seed: Seed of the sampling.
        best_of: Number of reference samples per prompt to pick the best from; 0: none.
        samples_per_prompt: Number of samples per prompt, of each model, that accuracy and pass@k are computed from; all
            other figures are of the first one.
        prompt_styles: Prompting baselines: the reference is also prompted in these styles, and its responses are scored
            as responses to the plain prompts.
    """

    prompts: Sequence[Request]
    sampling: Sampling
    seed: int
    best_of: int = 0
    samples_per_prompt: int = 1
    prompt_styles: Mapping[str, PromptStyle] = field(default_factory=dict)

    def draws(self) -> list[list[Request]]:
        """The prompts once per draw, each with its own seed."""
        return [self._draw(draw) for draw in range(max(self.samples_per_prompt, self.best_of))]

    def _draw(self, draw: int) -> list[Request]:
        requests = []
        for index, prompt in enumerate(self.prompts):
            requests.append(replace(prompt, seed=seed_for(self.seed, "heldout", index, draw)))
        return requests


@dataclass(frozen=True)
class ReferenceSamples:
    """The reference's responses.

    Attributes:
        draws: Responses to the held-out prompts, per draw.
        styles: Responses to the prompts of the first draw, by prompt style.
    """

    draws: list[Samples]
    styles: dict[str, Samples]


@dataclass(frozen=True)
class Evaluation:
    """A comparison of the policy with the reference.

    Attributes:
        sections: The sections `reference`, `policy`, `best_of`, `prompt_styles` and `prompts` of `evaluation.json`.
        policy: The policy's responses.
        reference: The reference's, to the same prompts, sampled with the same seeds.
    """

    sections: dict[str, Any]
    policy: ScoredSamples
    reference: ScoredSamples

    def probes(self, tokenizer: PreTrainedTokenizerBase, count: int) -> list[dict[str, Any]]:
        """The responses of both to the first `count` prompts, as rows of `samples.jsonl`."""
        after = self.policy.rows(tokenizer, "response", count)
        before = self.reference.rows(tokenizer, "reference", count)
        prompts = [prompt_text(trajectory.request.prompt) for trajectory in self.policy.trajectories[:count]]
        return [{"prompt": text} | old | new for text, old, new in zip(prompts, before, after, strict=True)]


class Evaluator:
    """Samples policy and reference with the same seeds and compares them. The reference is sampled only once."""

    def __init__(self, pool: Pool, scorers: EvaluationScorers, reference: AdapterWeights, heldout: HeldoutPlan) -> None:
        self.pool = pool
        self.scorers = scorers
        self.reference = reference
        self.heldout = heldout
        self.draws = heldout.draws()

    def evaluate(self, version: int, policy: AdapterWeights) -> "Evaluation":
        """Compare the policy with the reference.

        Args:
            version: The version under which the pool loads the policy, which it still holds afterwards.
            policy: The policy's adapter.

        Returns:
            The sections of `evaluation.json`, and the responses that they are computed from.
        """
        references = [samples.score() for samples in self._reference_samples.draws]
        self.pool.load_adapter(version, policy)
        sampled = self._sample(self.draws[0], self.scorers.policy).score()
        right = _right([sampled, *self._further_samples()])
        reference_right = _right(references[: self.heldout.samples_per_prompt])
        policy_figures = _policy_figures(sampled, references[0]) | rule_figures(right)
        sections: dict[str, Any] = {
            "reference": references[0].figures() | rule_figures(reference_right),
            "policy": policy_figures | accuracy_gains(right, reference_right) | {"step": version},
        }
        if self.heldout.best_of:
            sections["best_of"] = _best_of(references[: self.heldout.best_of])
        if self.heldout.prompt_styles:
            sections["prompt_styles"] = self._style_figures(sampled)
        return Evaluation(sections | {"prompts": len(sampled.trajectories)}, sampled, references[0])

    def _further_samples(self) -> list[ScoredSamples]:
        """The policy's samples after its first; of these only the reward is of interest."""
        further = self.draws[1 : self.heldout.samples_per_prompt]
        return [self._sample(requests, self.scorers.reference).score() for requests in further]

    def _style_figures(self, policy: ScoredSamples) -> dict[str, dict[str, float]]:
        """Figures of the reference in each style, and how often the policy wins against it."""
        figures = {}
        for name, samples in self._reference_samples.styles.items():
            styled = samples.score()
            figures[name] = styled.figures() | rule_figures(_right([styled])) | _wins(policy, styled)
        return figures

    @cached_property
    def _reference_samples(self) -> ReferenceSamples:
        self.pool.load_adapter(REFERENCE_VERSION, self.reference)
        draws = [self._sample(requests, self.scorers.reference) for requests in self.draws]
        styles = {}
        for name, style in self.heldout.prompt_styles.items():
            styles[name] = self._sample(self.draws[0], self.scorers.reference, style)
        return ReferenceSamples(draws, styles)

    def _sample(
        self, requests: Sequence[Request], scorer: EvaluationScorer, style: PromptStyle | None = None
    ) -> Samples:
        """Responses of the model that the pool holds; they are scored as responses to the prompts without the style."""
        asked = requests if style is None else [style.ask(request) for request in requests]
        sampled = self.pool.generate(asked, self.heldout.sampling)
        answers = sampled if style is None else [style.answer(trajectory) for trajectory in sampled]
        trajectories = [replace(answer, request=request) for answer, request in zip(answers, requests, strict=True)]
        gold = None
        if self.scorers.gold is not None:
            gold = torch.tensor(self.scorers.gold(trajectories), dtype=torch.float64)
        return Samples(trajectories, scorer(trajectories), gold)


def _policy_figures(policy: ScoredSamples, reference: ScoredSamples) -> dict[str, float]:
    """The figures of the policy: its own, and those of its comparison with the reference."""
    figures = policy.figures() | _wins(policy, reference) | _kl_figures(policy)
    figures |= paired_gain(policy.scores, reference.scores, "score")
    if policy.gold is not None and reference.gold is not None:
        figures |= paired_gain(policy.gold, reference.gold, "gold")
    return figures


def _right(draws: Sequence[ScoredSamples]) -> dict[str, Tensor]:
    """Whether each sample is right by verifiable term, `[draws, prompts]`."""
    by_term: dict[str, list[Tensor]] = {}
    for samples in draws:
        for name, right in samples.right().items():
            by_term.setdefault(name, []).append(right)
    return {name: torch.stack(rights) for name, rights in by_term.items()}


def paired_gain(policy: Tensor, reference: Tensor, name: str) -> dict[str, float]:
    """How much higher the policy scores than the reference on the same prompts, with Student's 95 % interval.

    Args:
        policy: The policy's scores `[prompts]`.
        reference: The reference's scores `[prompts]`.
        name: The name of the score.

    Returns:
        `NAME_gain`, the mean of the differences, and the ends of its interval, `NAME_gain_low` and `NAME_gain_high`;
        without the latter two where there is only one prompt.
    """
    return with_interval(f"{name}_gain", policy.double() - reference.double())


def _kl_figures(policy: ScoredSamples) -> dict[str, float]:
    kl = torch.tensor([output.kl for output in policy.outputs], dtype=torch.float64)
    tokens = sum(trajectory.sampled_length for trajectory in policy.trajectories)
    return {"kl_per_sequence": float(kl.mean()), "kl_per_token": float(kl.sum()) / tokens}


def _wins(policy: ScoredSamples, baseline: ScoredSamples) -> dict[str, float]:
    """How often the policy scores higher than the baseline."""
    wins = {"win_rate": win_rate(policy.scores, baseline.scores)}
    if policy.gold is not None and baseline.gold is not None:
        wins["gold_win_rate"] = win_rate(policy.gold, baseline.gold)
    return wins


def _best_of(draws: Sequence[ScoredSamples]) -> dict[str, Any]:
    """Mean score, and mean gold score, of the sample per prompt that the reward scores highest.

    `gold_best_mean` is the mean gold score of the samples that the gold score itself would pick: no reward can do
    better. `curve` has the figures for fewer samples per prompt, with their KL to the reference.
    """
    scores = torch.stack([samples.scores.double() for samples in draws])
    gold = _stacked_gold(draws)
    curve = best_of_curve(scores, gold)
    figures: dict[str, Any] = {name: value for name, value in curve[-1].items() if name != "kl"}
    figures["curve"] = curve
    if gold is not None:
        figures["gold_best_mean"] = float(gold.amax(0).mean())
    return figures


def _stacked_gold(draws: Sequence[ScoredSamples]) -> Tensor | None:
    """Gold scores `[draws, prompts]`."""
    gold = [samples.gold for samples in draws if samples.gold is not None]
    return torch.stack(gold) if gold else None


def best_of_curve(scores: Tensor, gold: Tensor | None) -> list[dict[str, float]]:
    """`best_of_n` for 1, 2, 4, … and all of the N samples per prompt; arguments as there."""
    return [best_of_n(scores, gold, n) for n in powers_of_two_to(len(scores))]


def best_of_n(scores: Tensor, gold: Tensor | None, n: int) -> dict[str, float]:
    """Expected score, and gold score, of the best of n samples by score.

    The estimate is unbiased over all choices of n of the N samples: the sample of rank i is the best of C(i - 1, n - 1)
    of C(N, n) choices (Nakano et al. 2021, "WebGPT", appendix I).

    Args:
        scores: `[N, prompts]`, N samples per prompt.
        gold: `[N, prompts]`, their gold scores; None where there are none.
        n: Number of samples to pick from, between 1 and N.

    Returns:
        `n`, `score_mean`, `gold_mean` where there is a gold score, and `kl`, which is log n - (n - 1) / n nats, the KL
        of the best of n to a single sample (Stiennon et al. 2020, appendix G.3).
    """
    count = len(scores)
    shares = [math.comb(rank, n - 1) / math.comb(count, n) for rank in range(count)]
    weights = torch.tensor(shares, dtype=torch.float64)
    ascending, order = scores.sort(dim=0, stable=True)
    figures = {"n": n, "kl": math.log(n) - (n - 1) / n, "score_mean": float((weights @ ascending).mean())}
    if gold is not None:
        figures["gold_mean"] = float((weights @ gold.gather(0, order)).mean())
    return figures


def win_rate(policy: Tensor, baseline: Tensor) -> float:
    """Share of prompts for which the policy's score `[prompts]` is higher than the baseline's; ties count half."""
    return float(pair_accuracy(policy, baseline))


def distinct_2(sequences: Sequence[Sequence[int]]) -> float:
    """Distinct bigrams over all bigrams (Li et al. 2016, "distinct-2")."""
    bigrams: list[tuple[int, int]] = []
    for sequence in sequences:
        bigrams.extend(pairwise(sequence))
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def build_evaluator(
    experiment: Experiment,
    scorers: Scorers,
    pool: Pool,
    role_scorer: RoleScorer,
    reference: AdapterWeights,
    prompts: Sequence[Request],
    tokenizer: PreTrainedTokenizerBase,
) -> Evaluator:
    """Build the evaluator that the experiment's settings describe.

    Args:
        experiment: The settings.
        scorers: The scorers of the reward and the gold score.
        pool: Samples the responses.
        role_scorer: The forward passes of the roles.
        reference: The reference's adapter.
        prompts: The held-out prompts.
        tokenizer: Tokenizer of the base model.
    """
    rollouts = experiment.rollouts
    settings = experiment.evaluation
    temperature = rollouts.temperature if settings.temperature is None else settings.temperature
    encoder = TextEncoder(tokenizer, experiment.data.special_tokens)
    heldout = HeldoutPlan(
        prompts=prompts,
        sampling=Sampling(temperature, rollouts.max_new_tokens),
        seed=settings.seed,
        best_of=settings.best_of,
        samples_per_prompt=settings.samples_per_prompt,
        prompt_styles={name: PromptStyle(style, encoder) for name, style in settings.prompt_styles.items()},
    )
    evaluation_scorers = EvaluationScorers(
        policy=scorers.evaluation_scorer(role_scorer, ("policy", "reference", "reward")),
        reference=scorers.evaluation_scorer(role_scorer, ("reward",)),
        gold=scorers.gold,
    )
    return Evaluator(pool, evaluation_scorers, reference, heldout)
