"""The first screen of a page: what has come of the run in a sentence, and in four tiles."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.config.stage import all_stages
from align.report.run_record import RunRecord
from align.runtime.wording import counted
from rewards.diagnostics import wilson

UNKNOWN = "–"


@dataclass(frozen=True)
class Tile:
    """A figure of the first screen.

    Attributes:
        label: What it is.
        value: Its value.
        details: What helps to judge it, each in a line.
    """

    label: str
    value: str
    details: tuple[str, ...]


def sentence(run: RunRecord) -> str:
    """What has come of the run so far."""
    if run.is_extended:
        return f"{_outcome(run.evaluation, trainer_of(run))} It has been extended since: {_newest_step(run)}."
    if "policy" in run.evaluation:
        return _outcome(run.evaluation, trainer_of(run))
    if run.history.last_step("ppo") is not None:
        return f"PPO has not ended: {_newest_step(run)}."
    for stage in reversed(all_stages()):
        step = run.history.last_step(stage.name)
        if step is not None:
            trainer = trainer_of(run)
            logged = f"the stage {stage.name} has logged {counted(step, 'step')}"
            return (
                f"{trainer} has no evaluation yet: {logged}." if trainer == "DPO" else f"PPO has not begun; {logged}."
            )
    return "The run has logged nothing yet."


def trainer_of(run: RunRecord) -> str:
    """What trains the policy of a run."""
    return "DPO" if run.experiment and "dpo" in run.experiment.stages else "PPO"


def _newest_step(run: RunRecord) -> str:
    """Where PPO is, of how many steps, and its newest score."""
    steps = f" of {run.experiment.ppo.steps:,}" if run.experiment else ""
    score = run.history.last("ppo", "reward/mean")
    newest = "" if score is None else f", where the mean score is {score:.3g}"
    return f"it is at step {run.history.last_step('ppo'):,}{steps}{newest}"


def _outcome(evaluation: Mapping[str, Any], trainer: str) -> str:
    policy = evaluation["policy"]
    key, noun = _judged_by(evaluation)
    change = policy[f"{key}_mean"] - evaluation["reference"][f"{key}_mean"]
    low = policy.get(f"{key}_gain_low")
    high = policy.get(f"{key}_gain_high")
    steps = counted(policy["step"], "step")
    if low is not None and low <= 0 <= high:
        effect = f"After {steps} of {trainer}, the {noun} is not clearly different from the SFT model's"
    else:
        direction = "raised" if change > 0 else "lowered"
        effect = f"{trainer} {direction} the {noun} by {abs(change):.3g} over the SFT model in {steps}"
    return f"{effect}, at a KL of {policy['kl_per_sequence']:.3g} nats per sequence."


def _judged_by(evaluation: Mapping[str, Any]) -> tuple[str, str]:
    """The key and the name of what says how good responses are: the gold score, where there is one."""
    return ("gold", "gold score") if "gold_mean" in evaluation["policy"] else ("score", "score")


def tiles(run: RunRecord) -> list[Tile]:
    """The four figures of the first screen; a value is a dash where the run has not come that far."""
    return [_change(run), _distance(run), _wins(run), _accuracy(run)]


def _evaluated_at(run: RunRecord) -> tuple[str, ...]:
    """The step of the evaluation, where PPO has gone on since."""
    return (f"evaluated at step {run.evaluation['policy']['step']:,}",) if run.is_extended else ()


def _change(run: RunRecord) -> Tile:
    if "policy" not in run.evaluation:
        score = run.history.last("ppo", "reward/mean")
        newest = () if score is None else (f"newest mean score {score:.3g}",)
        return Tile("Change of the score", UNKNOWN, (*newest, "known when PPO has ended"))
    policy = run.evaluation["policy"]
    key, noun = _judged_by(run.evaluation)
    before = run.evaluation["reference"][f"{key}_mean"]
    after = policy[f"{key}_mean"]
    details = [f"from {before:.3g} to {after:.3g}"]
    if f"{key}_gain_low" in policy:
        low = policy[f"{key}_gain_low"]
        high = policy[f"{key}_gain_high"]
        details.insert(0, f"95% interval {low:+.3g} to {high:+.3g}")
    return Tile(f"Change of the {noun}", f"{after - before:+.3g}", (*details, *_evaluated_at(run)))


def _distance(run: RunRecord) -> Tile:
    label = "KL to the reference"
    unit = "nats per sequence"
    if "policy" in run.evaluation:
        policy = run.evaluation["policy"]
        details = (unit, f"{policy['kl_per_token']:.3g} per token", *_evaluated_at(run))
        return Tile(label, f"{policy['kl_per_sequence']:.3g}", details)
    newest = run.history.last("ppo", "kl/per_sequence")
    if newest is None:
        return Tile(label, UNKNOWN, ("known once PPO has begun",))
    return Tile(label, f"{newest:.3g}", (unit, "of the newest step"))


def _wins(run: RunRecord) -> Tile:
    label = "Wins over the reference"
    policy = run.evaluation.get("policy")
    if policy is None:
        newest = run.history.last("ppo", "eval/win_rate")
        if newest is None:
            return Tile(label, UNKNOWN, ("known when PPO has ended",))
        return Tile(label, f"{newest:.0%}", ("of the newest evaluation, by score",))
    by_gold = "gold_win_rate" in policy
    share = policy["gold_win_rate" if by_gold else "win_rate"]
    interval = wilson(share, run.evaluation["prompts"])
    details = [
        f"95% interval {interval.accuracy_low:.0%} to {interval.accuracy_high:.0%}",
        f"of {counted(run.evaluation['prompts'], 'prompt')}, by {'gold score' if by_gold else 'score'}",
    ]
    if by_gold:
        details.append(f"{policy['win_rate']:.0%} by score")
    return Tile(label, f"{share:.0%}", (*details, *_evaluated_at(run)))


def _accuracy(run: RunRecord) -> Tile:
    label = "Accuracy of the reward model"
    measured = run.evaluation.get("reward_model") or run.diagnostics
    if "accuracy" not in measured:
        return Tile(label, UNKNOWN, ("no preferences were held out, or it is not trained yet",))
    details = [f"95% interval {measured['accuracy_low']:.0%} to {measured['accuracy_high']:.0%}"]
    if "ceiling" in run.diagnostics:
        details.append(f"at most {run.diagnostics['ceiling']:.0%}, as certain as the labels are")
    if constant := run.diagnostics.get("baselines", {}).get("constant"):
        details.append(f"{constant['accuracy']:.0%} by one judgement for every step")
    if longer := run.diagnostics.get("baselines", {}).get("longer"):
        details.append(f"{longer['accuracy']:.0%} by length alone")
    return Tile(label, f"{measured['accuracy']:.0%}", tuple(details))
