"""Reference and policy side by side on held-out prompts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from statistics import fmean
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.config.schema import Experiment
from align.evaluation.prompt_styles import PromptStyle, make_prompt_style
from align.runtime.seeds import seed_for
from align.scoring.build import Scorers
from align.scoring.reward import EvaluationScorer, Gold, Rescore, RoleScorer
from policies.trunk import AdapterWeights
from rewards.losses import pair_accuracy
from rollouts.engine import Sampling
from rollouts.pool import Pool
from rollouts.trajectory import Request, RoleOutputs, Trajectory, lengths

REFERENCE_VERSION = -1
"""The version under which the pool holds the reference while it is judged."""


@dataclass(frozen=True)
class Side:
    """One model's responses to the held-out prompts, one a prompt, and what is known of them."""

    trajectories: list[Trajectory]
    scored: list[RoleOutputs]
    gold: Tensor | None

    @property
    def scores(self) -> Tensor:
        return torch.tensor([output.score for output in self.scored])

    def figures(self) -> dict[str, float]:
        """The figures of `evaluation.json` that either side has."""
        figures = {
            "score_mean": float(self.scores.mean()),
            "score_std": float(self.scores.std(correction=0)),
            "length_mean": float(lengths(self.trajectories).double().mean()),
            "distinct_2": distinct_2([t.response_ids for t in self.trajectories]),
            "eos_share": sum(t.ended for t in self.trajectories) / len(self.trajectories),
        }
        if "spread" in self.scored[0].notes:
            figures["spread_mean"] = fmean(output.notes["spread"] for output in self.scored)
        return figures if self.gold is None else figures | {"gold_mean": float(self.gold.mean())}


class Evaluator:
    """Samples both sides with the same seeds and compares them. The reference is sampled once."""

    def __init__(
        self,
        pool: Pool,
        score: EvaluationScorer,
        rate: EvaluationScorer,
        gold: Gold | None,
        reference: AdapterWeights,
        prompts: Sequence[Request],
        sampling: Sampling,
        seed: int,
        best_of: int,
        styles: Mapping[str, PromptStyle] = MappingProxyType({}),
    ) -> None:
        """score: verdicts on the policy's trajectories, KL and score; rate: on the reference's, the score alone.

        best_of: how many reference samples a prompt to pick from; 0: not. styles: in which the reference is asked too;
        its responses are judged as answers to the prompts as they were.
        """
        self.styles = styles
        self.pool, self.score, self.rate, self.gold = pool, score, rate, gold
        self.sampling, self.best_of = sampling, best_of
        self.weights = reference
        self.draws = [
            [replace(p, seed=seed_for(seed, "heldout", index, draw)) for index, p in enumerate(prompts)]
            for draw in range(max(1, best_of))
        ]

    def judge(self, version: int, policy: AdapterWeights) -> dict[str, Any]:
        """The sections `reference`, `policy`, `best_of`, `styles` and `prompts` of `evaluation.json`.

        The pool holds the policy when this returns.
        """
        draws, styled = self._of_reference
        references = [sampled.now() for sampled in draws]
        self.pool.load_adapter(version, policy)
        side = self._sample(self.draws[0], self.score).now()
        kl = torch.tensor([output.kl for output in side.scored], dtype=torch.float64)
        compared = _wins(side, references[0]) | {
            "kl_per_sequence": float(kl.mean()),
            "kl_per_token": float(kl.sum()) / int(lengths(side.trajectories).sum()),
            "step": version,
        }
        sections: dict[str, Any] = {"reference": references[0].figures(), "policy": side.figures() | compared}
        if self.best_of:
            sections["best_of"] = _best_of(references)
        if styled:
            now = {name: sampled.now() for name, sampled in styled.items()}
            sections["prompt_styles"] = {name: own.figures() | _wins(side, own) for name, own in now.items()}
        return sections | {"prompts": len(side.trajectories)}

    @cached_property
    def _of_reference(self) -> tuple[list["Sampled"], dict[str, "Sampled"]]:
        """The reference's responses at each draw, and to the first draw's prompts in each style."""
        self.pool.load_adapter(REFERENCE_VERSION, self.weights)
        draws = [self._sample(requests, self.rate) for requests in self.draws]
        return draws, {name: self._sample(self.draws[0], self.rate, style) for name, style in self.styles.items()}

    def _sample(
        self, requests: Sequence[Request], ask: EvaluationScorer, style: PromptStyle | None = None
    ) -> "Sampled":
        requested_roles = requests if style is None else [style(request) for request in requests]
        answers = self.pool.generate(requested_roles, self.sampling)
        trajectories = [replace(t, request=request) for t, request in zip(answers, requests, strict=True)]
        gold = None if self.gold is None else torch.tensor(self.gold(trajectories), dtype=torch.float64)
        return Sampled(trajectories, ask(trajectories), gold)


@dataclass(frozen=True)
class Sampled:
    """Responses, and what is asked for their verdicts: a reward that learns says another thing later."""

    trajectories: list[Trajectory]
    outputs: Rescore
    gold: Tensor | None

    def now(self) -> Side:
        return Side(self.trajectories, self.outputs(), self.gold)


def _wins(ours: Side, theirs: Side) -> dict[str, float]:
    """How often ours scores higher than theirs."""
    wins = {"win_rate": win_rate(ours.scores, theirs.scores)}
    if ours.gold is None or theirs.gold is None:
        return wins
    return wins | {"gold_win_rate": win_rate(ours.gold, theirs.gold)}


def _best_of(sides: Sequence[Side]) -> dict[str, Any]:
    """For each prompt the sample that the reward scores highest: its mean score, and its mean gold score.

    `gold_best_mean` is that of the samples that the gold score itself would pick: no reward can do better.
    `curve`: the same for fewer samples a prompt, with their KL to the reference.
    """
    scores = torch.stack([side.scores.double() for side in sides])
    gold = [side.gold for side in sides if side.gold is not None]
    table = torch.stack(gold) if gold else None
    powers = [2**i for i in range(len(sides).bit_length()) if 2**i < len(sides)]
    curve = [best_of_n(scores, table, n) for n in (*powers, len(sides))]
    figures = {name: value for name, value in curve[-1].items() if name != "kl"} | {"curve": curve}
    return figures if table is None else figures | {"gold_best_mean": float(table.amax(0).mean())}


def best_of_n(scores: Tensor, gold: Tensor | None, n: int) -> dict[str, float]:
    """Expected score, and gold score, of the best by score of n of the N samples a prompt; both `[N, prompts]`.

    Unbiased, over all choices of n: the sample of rank i is the best of C(i - 1, n - 1) of C(N, n) (Nakano et al. 2021,
    "WebGPT", appendix I). kl: log n - (n - 1) / n nats, that of the best of n to the one (Stiennon et al. 2020,
    appendix G.3).
    """
    count = len(scores)
    shares = [math.comb(rank, n - 1) / math.comb(count, n) for rank in range(count)]
    weights = torch.tensor(shares, dtype=torch.float64)
    rising, order = scores.sort(dim=0, stable=True)
    figures = {"n": n, "kl": math.log(n) - (n - 1) / n, "score_mean": float((weights @ rising).mean())}
    return figures if gold is None else figures | {"gold_mean": float((weights @ gold.gather(0, order)).mean())}


def win_rate(ours: Tensor, theirs: Tensor) -> float:
    """Share of prompts in which ours scores higher, ties counted half."""
    return float(pair_accuracy(ours, theirs))


def distinct_2(rows: Sequence[Sequence[int]]) -> float:
    """Different pairs of neighbouring tokens over all such pairs (Li et al. 2016, "distinct-2")."""
    pairs = [pair for row in rows for pair in pairwise(row)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def build_evaluator(
    experiment: Experiment,
    judges: Scorers,
    pool: Pool,
    roles_score: RoleScorer,
    reference: AdapterWeights,
    prompts: Sequence[Request],
    tokenizer: PreTrainedTokenizerBase,
) -> Evaluator:
    """The evaluator that the experiment asks for."""
    rollouts, settings = experiment.rollouts, experiment.evaluation
    warm = rollouts.temperature if settings.temperature is None else settings.temperature
    sampling = Sampling(warm, rollouts.max_new_tokens)
    styles = {name: make_prompt_style(style, tokenizer) for name, style in settings.prompt_styles.items()}
    score = judges.evaluation_scorer(roles_score, ("policy", "reference", "reward"))
    rate = judges.evaluation_scorer(roles_score, ("reward",))
    return Evaluator(
        pool, score, rate, judges.gold, reference, prompts, sampling, settings.seed, settings.best_of, styles
    )
