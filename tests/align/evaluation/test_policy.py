import math
from collections.abc import Callable, Sequence
from itertools import combinations
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from transformers import PreTrainedTokenizerFast

from align.evaluation.policy import (
    REFERENCE_VERSION,
    EvaluationScorers,
    Evaluator,
    HeldoutPlan,
    best_of_n,
    distinct_2,
    paired_gain,
    win_rate,
)
from policies.trunk import AdapterWeights
from rollouts.engine import Sampling
from rollouts.trajectory import Request, RoleOutputs, Trajectory

SCORES = st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=20)
PROMPTS = [Request(name, (1,), seed=0) for name in ("p", "q")]
DRAWS = {"p": [(5, 1.0, 10.0), (6, 3.0, 20.0), (7, 2.0, 90.0)], "q": [(5, 4.0, 40.0), (6, 0.0, 60.0), (7, 0.0, 0.0)]}
"""What the reference samples at each draw: a token, its score, its gold score."""
POLICY = {"p": (8, 2.0, 10.0), "q": (9, 1.0, 70.0)}
SCORES_OF = {(p, t): (score, gold) for p in DRAWS for t, score, gold in (*DRAWS[p], POLICY[p])}


class ListedPool:
    """Gives the responses that are listed above, the reference's in the order of its draws."""

    peak_memory = None

    def __init__(self) -> None:
        self.loaded: list[tuple[int, AdapterWeights]] = []
        self.seeds: list[tuple[int, list[int]]] = []

    def load_adapter(self, version: int, weights: AdapterWeights) -> None:
        self.loaded.append((version, weights))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        version = self.loaded[-1][0]
        draw = sum(earlier == version for earlier, _ in self.seeds)
        self.seeds.append((version, [request.seed for request in requests]))
        trajectories = []
        for request in requests:
            prompt = str(request.prompt)
            token = (DRAWS[prompt][draw] if version == REFERENCE_VERSION else POLICY[prompt])[0]
            ids = (token,) * (2 if prompt == "p" else 4)
            ended = prompt == "p"
            trajectories.append(Trajectory.from_tokens(request, ids, torch.zeros(len(ids)), ended, version))
        return trajectories

    def close(self) -> None: ...


def scores_of(trajectory: Trajectory) -> tuple[float, float]:
    return SCORES_OF[str(trajectory.request.prompt), trajectory.response_ids[0]]


def score(trajectories: Sequence[Trajectory]) -> list[RoleOutputs]:
    """The policy is half a nat above the reference at each token."""
    outputs = []
    for trajectory in trajectories:
        logprobs, values = torch.zeros(trajectory.length), torch.zeros(trajectory.length + 1)
        outputs.append(RoleOutputs(logprobs, logprobs - 0.5, values, scores_of(trajectory)[0]))
    return outputs


def scorer(trajectories: Sequence[Trajectory]) -> Callable[[], list[RoleOutputs]]:
    return lambda: score(trajectories)


def gold(trajectories: Sequence[Trajectory]) -> list[float]:
    return [scores_of(t)[1] for t in trajectories]


def evaluator(pool: ListedPool, best_of: int = 0, with_gold: bool = True) -> Evaluator:
    scorers = EvaluationScorers(policy=scorer, reference=scorer, gold=gold if with_gold else None)
    heldout = HeldoutPlan(PROMPTS, Sampling(1.0, 4), seed=7, best_of=best_of)
    return Evaluator(pool, scorers, {"a": torch.zeros(1)}, heldout)


def test_a_tie_is_half_a_win() -> None:
    assert win_rate(torch.tensor([2.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])) == 0.5 * (2 + 2) / 4


@given(SCORES)
def test_the_win_rates_of_both_models_add_up_to_one(pairs: list[tuple[int, int]]) -> None:
    ours, theirs = torch.tensor(pairs).T
    assert win_rate(ours, theirs) + win_rate(theirs, ours) == pytest.approx(1)


@pytest.mark.parametrize(
    ("sequences", "share"), [([[1, 2, 1, 2]], 2 / 3), ([[1, 2], [1, 2]], 1 / 2), ([[1, 2], [2, 1]], 1), ([[1], []], 0)]
)
def test_distinct_2_counts_bigrams_within_sequences_and_once_over_all(sequences: list[list[int]], share: float) -> None:
    assert distinct_2(sequences) == pytest.approx(share)


def test_the_best_of_is_what_the_reward_picks_and_the_gold_best_what_gold_picks() -> None:
    best = evaluator(ListedPool(), best_of=3).evaluate(5, {}).sections["best_of"]
    curve = best.pop("curve")
    assert best == {"n": 3, "score_mean": (3 + 4) / 2, "gold_mean": (20 + 40) / 2, "gold_best_mean": (90 + 60) / 2}
    assert [point["n"] for point in curve] == [1, 2, 3]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_the_best_of_n_is_the_mean_over_all_choices_of_n_samples(count: int, n: int, seed: int) -> None:
    n = min(n, count)
    scores, gold = torch.rand(2, count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    choices = [list(choice) for choice in combinations(range(count), n)]
    best_scores, best_gold = [], []
    for choice in choices:
        best = scores[choice].max(0)
        best_scores.append(best.values)
        best_gold.append(gold[choice].gather(0, best.indices[None])[0])
    figures = best_of_n(scores, gold, n)
    assert figures["score_mean"] == pytest.approx(float(torch.stack(best_scores).mean()))
    assert figures["gold_mean"] == pytest.approx(float(torch.stack(best_gold).mean()))
    assert figures["kl"] == pytest.approx(math.log(n) - (n - 1) / n)


def test_the_best_of_one_is_the_reference_itself() -> None:
    figures = evaluator(ListedPool(), best_of=1).evaluate(5, {}).sections
    assert figures["best_of"]["score_mean"] == figures["reference"]["score_mean"] == (1 + 4) / 2


def test_without_best_of_and_gold_their_figures_are_absent() -> None:
    figures = evaluator(ListedPool(), with_gold=False).evaluate(5, {}).sections
    assert figures.keys() == {"reference", "policy", "prompts"}
    assert not [name for name in (*figures["reference"], *figures["policy"]) if "gold" in name]


def test_figures_of_policy_and_reference() -> None:
    figures = evaluator(ListedPool()).evaluate(5, {}).sections
    both = {"length_mean": 3.0, "eos_share": 0.5}
    reference = {"score_mean": 2.5, "score_std": 1.5, "gold_mean": 25.0, "distinct_2": 1 / 4}
    policy = {"score_mean": 1.5, "score_std": 0.5, "gold_mean": 40.0, "distinct_2": 2 / 4}
    compared = {"win_rate": 0.5, "gold_win_rate": 0.75, "kl_per_sequence": 1.5, "kl_per_token": 0.5, "step": 5}
    assert figures["reference"] == pytest.approx(reference | both)
    gains = {"score_gain": -1.0, "score_gain_low": -26.41, "score_gain_high": 24.41}
    gold_gains = {"gold_gain": 15.0, "gold_gain_low": -175.6, "gold_gain_high": 205.6}
    assert figures["policy"] == pytest.approx(policy | both | compared | gains | gold_gains, rel=0.01)


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=2, max_size=30))
def test_the_interval_of_the_gain_is_that_of_paired_differences(pairs: list[tuple[float, float]]) -> None:
    policy, reference = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
    differences = [higher - lower for higher, lower in pairs]
    half_width = student.ppf(0.975, len(pairs) - 1) * stdev(differences) / math.sqrt(len(pairs))
    expected = {
        "gold_gain": fmean(differences),
        "gold_gain_low": fmean(differences) - half_width,
        "gold_gain_high": fmean(differences) + half_width,
    }
    assert paired_gain(policy, reference, "gold") == pytest.approx(expected, abs=1e-9)


def test_the_gain_on_one_prompt_has_no_interval() -> None:
    assert paired_gain(torch.tensor([3.0]), torch.tensor([1.0]), "score") == {"score_gain": 2.0}


def test_the_reference_is_sampled_once_and_the_policy_stays_loaded() -> None:
    pool = ListedPool()
    evaluate = evaluator(pool, best_of=2).evaluate
    evaluate(5, {"b": torch.ones(1)})
    evaluate(6, {"c": torch.ones(1)})
    assert [(version, *weights) for version, weights in pool.loaded] == [(REFERENCE_VERSION, "a"), (5, "b"), (6, "c")]


def test_policy_and_reference_share_the_first_draws_seeds_and_every_other_draw_has_its_own() -> None:
    pool = ListedPool()
    evaluator(pool, best_of=2).evaluate(5, {})
    (_, first), (_, second), (_, policy) = pool.seeds
    assert (first, len({*first, *second})) == (policy, 4)


def test_probes_are_the_responses_of_both_to_the_first_prompts(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    evaluation = evaluator(ListedPool()).evaluate(5, {})
    (probe,) = evaluation.probes(tiny_tokenizer, 1)
    policy, reference = evaluation.policy, evaluation.reference
    assert probe["prompt"] == str(PROMPTS[0].prompt)
    for name, model in (("response", policy), ("reference", reference)):
        assert probe[name] == tiny_tokenizer.decode(model.trajectories[0].response_ids)
        assert probe[f"{name}_score"] == model.outputs[0].score
        assert probe[f"{name}_length"] == model.trajectories[0].length
        assert model.gold is not None
        assert probe[f"{name}_gold"] == float(model.gold[0])
    assert probe["response"] != probe["reference"]
    assert len(evaluation.probes(tiny_tokenizer, 100)) == len(PROMPTS)
