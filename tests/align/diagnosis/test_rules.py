"""Each rule on made-up figures: it speaks where its cause is planted, and is silent on a healthy run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from align.diagnosis.diagnose import RULES, verdicts
from align.diagnosis.run_figures import Curve, RunFigures
from align.diagnosis.thresholds import thresholds_table
from align.diagnosis.verdict import Severity

Curves = dict[str, Sequence[float]]

STEPS = 10
HEALTHY: Curves = {
    "reward/mean": [0.1 * step for step in range(STEPS)],
    "reward/gold_mean": [0.08 * step for step in range(STEPS)],
    "reward/std": [1.0] * STEPS,
    "reward/term_std/model": [1.0] * STEPS,
    "kl/per_sequence": [0.5 * step for step in range(STEPS)],
    "kl/per_token": [0.01 * step for step in range(STEPS)],
    "kl/coefficient": [0.05] * STEPS,
    "policy/entropy": [1.0 - 0.05 * step for step in range(STEPS)],
    "policy/clip_fraction": [0.1] * STEPS,
    "policy/approximate_kl": [0.01] * STEPS,
    "policy/learning_rate": [1e-3] * STEPS,
    "value/explained_variance": [0.04 * step - 0.1 for step in range(STEPS)],
    "value/learning_rate": [1e-3] * STEPS,
    "rollout/eos_share": [0.95] * STEPS,
    "rollout/length_mean": [30.0 + 0.1 * step for step in range(STEPS)],
    "rollout/mismatch_mean": [1e-6] * STEPS,
    "rollout/mismatch_share": [0.0] * STEPS,
    "rollout/staleness": [0.0] * STEPS,
    "learner/skipped_steps": [0.0] * STEPS,
}
GOOD_REWARD_MODEL: dict[str, Any] = {
    "accuracy": 0.75,
    "accuracy_low": 0.73,
    "baselines": {"longer": {"accuracy": 0.52}},
    "by_length_difference": [{"accuracy": 0.74}, {"accuracy": 0.77}],
}
LENGTH_MODEL = GOOD_REWARD_MODEL | {
    "baselines": {"longer": {"accuracy": 0.7}},
    "by_length_difference": [{"accuracy": 0.4}, {"accuracy": 0.9}],
}
GROWING: Curves = {"rollout/length_mean": [30.0 + 3 * step for step in range(STEPS)]}
PEAKED = [0.5 * min(step, 10 - step) for step in range(STEPS)]

SICK: dict[str, tuple[Curves, str, Severity]] = {
    "stale weights": (
        {"rollout/mismatch_share": [0.0, *[0.6] * 9], "rollout/mismatch_mean": [0.0, *[0.2] * 9]},
        "sampler mismatch",
        Severity.SERIOUS,
    ),
    "far behind": (
        {"rollout/staleness": [1.0] * STEPS, "rollout/mismatch_mean": [0.3] * STEPS},
        "sampler mismatch",
        Severity.SERIOUS,
    ),
    "not finite": ({"learner/skipped_steps": [1.0] * STEPS}, "skipped updates", Severity.SERIOUS),
    "equal groups": ({"reward/zero_std_share": [0.9] * STEPS}, "no spread", Severity.SERIOUS),
    "equal scores": ({"reward/std": [0.0] * STEPS, "kl/coefficient": [0.0] * STEPS}, "no spread", Severity.SERIOUS),
    "large β": ({"kl/coefficient": [4.0] * STEPS}, "KL too strong", Severity.SERIOUS),
    "half cut": ({"rollout/eos_share": [0.4] * STEPS}, "truncated responses", Severity.WARNING),
    "cut at first": (
        {"rollout/eos_share": [0.2 + 0.08 * step for step in range(STEPS)]},
        "truncated responses",
        Severity.WARNING,
    ),
    "all cut": ({"rollout/eos_share": [0.0] * STEPS}, "truncated responses", Severity.SERIOUS),
    "gold falls": ({"reward/gold_mean": PEAKED}, "reward hacking", Severity.SERIOUS),
    "gold falls from the start": (
        {"reward/gold_mean": [-0.1 * step for step in range(STEPS)]},
        "reward hacking",
        Severity.SERIOUS,
    ),
    "disagreement": (
        {"reward/gold_mean": [], "reward/spread": [0.1 + 0.02 * step for step in range(STEPS)]},
        "reward hacking",
        Severity.WARNING,
    ),
    "low entropy": ({"policy/entropy": [0.6**step for step in range(STEPS)]}, "entropy collapse", Severity.SERIOUS),
    "no critic": ({"value/explained_variance": [0.01] * STEPS}, "critic does not learn", Severity.SERIOUS),
    "far": ({"kl/per_token": [0.3 * step for step in range(STEPS)]}, "KL too weak", Severity.WARNING),
    "clipped": ({"policy/clip_fraction": [0.6] * STEPS}, "updates too large", Severity.WARNING),
    "fast": ({"policy/approximate_kl": [0.3] * STEPS}, "updates too large", Severity.WARNING),
    "constant": ({"reward/term_std/format": [0.0] * STEPS}, "constant term", Severity.WARNING),
}


def figures(curves: Curves, diagnostics: Mapping[str, Any] = GOOD_REWARD_MODEL) -> RunFigures:
    """A run with these curves of PPO."""
    lines = []
    for index in range(STEPS):
        values = {name: curve[index] for name, curve in curves.items() if index < len(curve)}
        lines.append({"stage": "ppo", "step": index + 1, **values})
    return RunFigures(lines, diagnostics, {"rollouts": {"max_new_tokens": 32}})


def test_a_healthy_run_has_no_verdict() -> None:
    assert verdicts(figures(HEALTHY)) == []


def test_a_run_that_has_logged_nothing_has_no_verdict() -> None:
    assert verdicts(RunFigures([])) == []


@pytest.mark.parametrize("length", range(1, 8))
def test_the_first_steps_of_a_healthy_run_have_no_verdict(length: int) -> None:
    assert verdicts(figures({name: curve[:length] for name, curve in HEALTHY.items()})) == []


@pytest.mark.parametrize("case", SICK)
def test_a_planted_cause_is_the_only_verdict(case: str) -> None:
    changes, name, severity = SICK[case]
    (verdict,) = verdicts(figures(HEALTHY | changes))
    assert (verdict.name, verdict.severity) == (name, severity)
    assert verdict.evidence
    assert verdict.advice
    logged = HEALTHY | changes
    assert all(evidence.metric in logged for evidence in verdict.evidence)


def test_advice_names_no_setting_that_the_run_has() -> None:
    stale = HEALTHY | SICK["stale weights"][0]
    settings = {"rollouts": {"engine": "transformers"}, "model": {"dtype": "auto"}}
    (verdict,) = verdicts(RunFigures(figures(stale).lines, GOOD_REWARD_MODEL, settings))
    assert "model.dtype=float32" in verdict.advice
    assert not any(advice.startswith("rollouts.engine") for advice in verdict.advice)


def test_an_entropy_that_has_recovered_had_collapsed() -> None:
    entropy = [1.0, 1.0, 0.8, 0.4, 0.2, 0.2, 0.3, 0.6, 0.8, 0.8]
    (verdict,) = verdicts(figures(HEALTHY | {"policy/entropy": entropy}))
    assert verdict.name == "entropy collapse"
    assert verdict.evidence[1].step == 6
    assert verdict.evidence[1].value == pytest.approx(0.2)


def test_a_reward_model_that_learned_length_is_serious_once_responses_grow() -> None:
    (warned,) = verdicts(figures(HEALTHY, LENGTH_MODEL))
    (serious,) = verdicts(figures(HEALTHY | GROWING, LENGTH_MODEL))
    assert warned.name == serious.name == "reward model learned length"
    assert (warned.severity, serious.severity) == (Severity.WARNING, Severity.SERIOUS)
    assert verdicts(figures(HEALTHY | GROWING)) == []


def test_a_reward_model_near_chance_guesses() -> None:
    (verdict,) = verdicts(figures(HEALTHY, GOOD_REWARD_MODEL | {"accuracy": 0.51}))
    assert verdict.name == "reward model guesses"


def test_sft_whose_heldout_loss_rises_overfits() -> None:
    rows = [{"stage": "sft", "step": step, "sft/heldout_loss": loss} for step, loss in ((1, 2.0), (2, 1.0), (3, 1.2))]
    (verdict,) = verdicts(RunFigures(rows))
    assert verdict.name == "SFT overfits"
    assert verdict.evidence[0].step == 2


def test_noise_alone_is_no_fall_of_the_gold_score() -> None:
    noisy = [0.5 + 0.1 * (-1) ** step for step in range(STEPS)]
    assert verdicts(figures(HEALTHY | {"reward/gold_mean": noisy})) == []


def test_scores_that_are_alike_because_the_policy_has_learned_are_no_strong_penalty() -> None:
    learned = {"reward/std": [1.0 - 0.097 * step for step in range(STEPS)], "kl/coefficient": [0.2] * STEPS}
    assert verdicts(figures(HEALTHY | learned)) == []


def test_serious_verdicts_come_first_and_causes_before_effects() -> None:
    changes = SICK["constant"][0] | SICK["no critic"][0] | SICK["large β"][0]
    names = [verdict.name for verdict in verdicts(figures(HEALTHY | changes))]
    assert names == ["KL too strong", "critic does not learn", "constant term"]


def test_advice_follows_the_settings_of_the_run() -> None:
    (cut,) = verdicts(figures(HEALTHY | SICK["all cut"][0]))
    assert "rollouts.max_new_tokens=64" in cut.advice
    (critic,) = verdicts(figures(HEALTHY | SICK["no critic"][0]))
    assert "learner.critic_learning_rate=0.01" in critic.advice


def test_the_document_has_every_verdict_and_threshold() -> None:
    text = (Path(__file__).parents[3] / "docs" / "reading-a-run.md").read_text(encoding="utf-8")
    assert thresholds_table() in text
    for name in {name for _, name, _ in SICK.values()} | {"reward model learned length", "reward model guesses"}:
        assert f"\n| {name} |" in text


def test_every_rule_has_a_test() -> None:
    assert len(RULES) == len({name for _, name, _ in SICK.values()}) + 3  # length, guesses, SFT


def test_a_curve_leaves_out_what_is_not_finite() -> None:
    rows = [{"stage": "ppo", "step": step, "a": value} for step, value in enumerate((1.0, None, float("nan"), 3.0))]
    assert RunFigures(rows).curve("a") == Curve("a", (0, 3), (1.0, 3.0))


def test_noise_is_what_is_left_of_a_line() -> None:
    assert Curve("a", (1, 2, 3, 4), (1.0, 2.0, 3.0, 4.0)).noise == 0
    assert Curve("a", (1, 2, 3), (0.0, 1.0, 0.0)).noise == pytest.approx(1.0)
