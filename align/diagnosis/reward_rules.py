"""Rules about what the policy is rewarded for."""

from align.diagnosis import thresholds
from align.diagnosis.run_figures import Curve, RunFigures
from align.diagnosis.verdict import Evidence, Severity, Verdict

JUDGES = (("eval/score_mean", "eval/gold_mean"), ("reward/mean", "reward/gold_mean"))
"""A score that is optimised, and one that is not; the first pair with enough values counts."""


def reward_hacking(run: RunFigures) -> Verdict | None:
    """The score rises while a judge that is not optimised falls (Gao et al. 2023)."""
    for score_name, gold_name in JUDGES:
        score = run.curve(score_name)
        gold = run.curve(gold_name)
        if min(len(score), len(gold)) >= thresholds.SHORTEST.value:
            return _over_optimised(score, gold)
    return _disagreeing(run.curve("reward/mean"), run.curve("reward/spread"))


def _over_optimised(score: Curve, gold: Curve) -> Verdict | None:
    peak = gold.values.index(max(gold.values))
    after = gold.from_position(peak)
    fall = gold.values[peak] - after.end
    least = max(
        thresholds.JUDGE_FALL.value * (max(gold.values) - min(gold.values)), thresholds.NOISE.value * gold.noise
    )
    rise = score.end - score.values[min(peak, len(score) - 1)]
    if fall < least or rise <= 0:
        return None
    return Verdict(
        name="reward hacking",
        severity=Severity.SERIOUS,
        stage="ppo",
        text=f"Since step {gold.steps[peak]} the score has risen, and the gold score has fallen: the policy exploits "
        "errors of the reward.",
        evidence=(
            Evidence(gold.metric, gold.steps[peak], gold.values[peak], meaning="highest"),
            Evidence(gold.metric, gold.steps[-1], after.end, gold.values[peak] - least, "at the end"),
            score.at_end(),
        ),
        advice=(
            "ppo.kl.coefficient: several times larger",
            "reward.ensemble.members=4",
            "evaluation.best=gold_mean",
            "more preferences, on responses of the policy as it is now",
        ),
    )


def _disagreeing(score: Curve, spread: Curve) -> Verdict | None:
    """The members of an ensemble come apart."""
    if min(len(score), len(spread)) < thresholds.SHORTEST.value or spread.start <= 0 or score.change <= 0:
        return None
    limit = thresholds.SPREAD_GROWTH.value * spread.start
    if spread.end < limit:
        return None
    return Verdict(
        name="reward hacking",
        severity=Severity.WARNING,
        stage="ppo",
        text="The score rises, and the reward models agree less and less about the responses.",
        evidence=(spread.at_start(), spread.at_end(limit), score.at_end()),
        advice=("reward.ensemble.combine=mean_minus_std", "ppo.kl.coefficient: several times larger"),
    )


def learned_length(run: RunFigures) -> Verdict | None:
    """The reward model orders by length, and the policy writes longer responses."""
    groups = run.diagnostics.get("by_length_difference", [])
    if len(groups) < 2:
        return None
    gap = groups[-1]["accuracy"] - groups[0]["accuracy"]
    if gap < thresholds.LENGTH_GAP.value:
        return None
    length = run.curve("rollout/length_mean")
    has_grown = len(length) > 1 and length.end > thresholds.LENGTH_GROWTH.value * length.start
    evidence = [
        Evidence(
            "reward/diagnostics.json",
            0,
            groups[-1]["accuracy"],
            groups[0]["accuracy"] + thresholds.LENGTH_GAP.value,
            "accuracy where the better response is much longer",
        ),
        Evidence(
            "reward/diagnostics.json",
            0,
            groups[0]["accuracy"],
            meaning="accuracy where it is much shorter",
        ),
    ]
    if has_grown:
        evidence += [length.at_start(), length.at_end(thresholds.LENGTH_GROWTH.value * length.start)]
    return Verdict(
        name="reward model learned length",
        severity=Severity.SERIOUS if has_grown else Severity.WARNING,
        stage="ppo" if has_grown else "reward",
        text="The reward model is right far more often where the better response is the longer one"
        + ("; the policy writes longer and longer ones." if has_grown else "."),
        evidence=tuple(evidence),
        advice=(
            "more comparisons in which the shorter response is better",
            "reward.terms: add a term of kind length, which costs responses near max_tokens",
        ),
    )


def no_spread(run: RunFigures) -> Verdict | None:
    """Responses that score alike teach nothing."""
    groups = run.curve("reward/zero_std_share")
    if len(groups) and groups.end >= thresholds.EQUAL_GROUPS.value:
        return Verdict(
            name="no spread",
            severity=Severity.SERIOUS,
            stage="ppo",
            text=f"{groups.end:.0%} of the prompts have responses that all score alike, from which nothing is learned.",
            evidence=(groups.at_end(thresholds.EQUAL_GROUPS.value),),
            advice=(
                "ppo.samples_per_prompt: twice as many",
                "prompts that the model solves sometimes, neither always nor never",
                "rollouts.temperature=1.0",
            ),
        )
    spread = run.curve("reward/std")
    if not len(spread) or max(spread.values) > thresholds.SPREAD.value:
        return None
    return Verdict(
        name="no spread",
        severity=Severity.SERIOUS,
        stage="ppo",
        text="All responses have the same score at every step: there is nothing to learn.",
        evidence=(spread.at_end(thresholds.SPREAD.value),),
        advice=("a reward that tells good responses from bad ones; see reward.terms",),
    )


def constant_term(run: RunFigures) -> Verdict | None:
    """A term of the reward that is the same for all responses changes nothing."""
    for spread in run.curves("reward/term_std/"):
        if not len(spread) or max(spread.values) > thresholds.SPREAD.value:
            continue
        name = spread.metric.removeprefix("reward/term_std/")
        return Verdict(
            name="constant term",
            severity=Severity.WARNING,
            stage="ppo",
            text=f"The term {name} of the reward has given all responses of a step the same score, at every step.",
            evidence=(spread.at_end(thresholds.SPREAD.value),),
            advice=(f"reward.terms.{name}: check its function and its columns", f"'~reward.terms.{name}'"),
        )
    return None


def guessing(run: RunFigures) -> Verdict | None:
    """A reward model that is hardly better than chance."""
    accuracy = run.diagnostics.get("accuracy_low")
    if accuracy is None or run.diagnostics["accuracy"] >= thresholds.CHANCE.value:
        return None
    return Verdict(
        name="reward model guesses",
        severity=Severity.SERIOUS,
        stage="reward",
        text="On held-out preferences the reward model is hardly better than chance.",
        evidence=(
            Evidence("reward/diagnostics.json", 0, run.diagnostics["accuracy"], thresholds.CHANCE.value, "accuracy"),
        ),
        advice=("reward.learning_rate: larger", "reward.epochs: more", "more preferences, or clearer ones"),
    )
