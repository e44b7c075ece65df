import pytest

from align.config.ppo_settings import StopSettings
from align.ppo.stop_rule import NoStopRule, StopRule
from policies.errors import UserError


def stops_at(values: list[float], **settings: float) -> int | None:
    """The step, counted from 1, after which the rule ends PPO."""
    rule = StopRule(StopSettings(metric="m", **settings))
    return next((step for step, value in enumerate(values, start=1) if rule.reason({"m": value})), None)


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({"above": 2.5}, 3),
        ({"above": 5.0}, None),
        ({"below": 0.5}, 5),
        ({"falls_by": 1.5}, 4),
        ({"falls_by": 1.5, "patience": 2}, 5),
        ({"above": 2.5, "patience": 2}, None),
        ({"above": 2.5, "below": 0.5}, 3),
    ],
)
def test_the_rule_stops_ppo_once_it_was_broken_for_enough_consecutive_steps(
    settings: dict[str, float], step: int | None
) -> None:
    assert stops_at([1.0, 2.0, 3.0, 1.0, 0.0], **settings) == step


def test_the_reason_names_the_broken_bound() -> None:
    rule = StopRule(StopSettings(metric="m", falls_by=1.0))
    assert rule.reason({"m": 4.0}) is None
    assert rule.reason({"m": 2.5}) == "m is 2.5, more than 1 below its highest value, for 1 step"


def test_a_rule_continues_from_a_saved_state() -> None:
    settings = StopSettings(metric="m", falls_by=1.0, patience=2)
    first = StopRule(settings)
    first.reason({"m": 4.0})
    first.reason({"m": 2.0})
    assert StopRule(settings, *first.state()).reason({"m": 2.0}) is not None


def test_a_metric_that_no_step_has_is_named() -> None:
    with pytest.raises(UserError, match=r"ppo.stop.metric: a step has no 'm'; it has kl, n"):
        StopRule(StopSettings(metric="m", above=1.0)).reason({"n": 1.0, "kl": 2.0})


def test_without_a_rule_ppo_runs_to_its_last_step() -> None:
    assert NoStopRule().reason({"m": float("nan")}) is None
    assert NoStopRule().state() == []


def test_the_reason_counts_consecutive_steps() -> None:
    rule = StopRule(StopSettings(metric="m", above=1.0, patience=2))
    assert rule.reason({"m": 3.0}) is None
    assert rule.reason({"m": 3.0}) == "m is 3, above 1, for 2 consecutive steps"
