import pytest

from align.config.schema import StopSettings
from align.ppo.stop_rule import StopRule
from policies.errors import UserError


def stops_at(values: list[float], **settings: float) -> int | None:
    """The step, counted from 1, after which the rule ends PPO."""
    rule = StopRule(StopSettings(metric="m", **settings))  # type: ignore[arg-type]
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
def test_the_rule_ends_ppo_once_it_was_broken_for_as_many_steps_in_a_row(settings: dict, step: int | None) -> None:
    assert stops_at([1.0, 2.0, 3.0, 1.0, 0.0], **settings) == step


def test_the_reason_says_what_was_broken() -> None:
    rule = StopRule(StopSettings(metric="m", falls_by=1.0))
    assert rule.reason({"m": 4.0}) is None
    assert rule.reason({"m": 2.5}) == "m is 2.5, under its best by 1, for 1 steps"


def test_a_rule_goes_on_from_the_state_that_was_saved() -> None:
    settings = StopSettings(metric="m", falls_by=1.0, patience=2)
    first = StopRule(settings)
    first.reason({"m": 4.0})
    first.reason({"m": 2.0})
    assert StopRule(settings, first.best, first.offences).reason({"m": 2.0}) is not None


def test_a_figure_that_no_step_has_is_named() -> None:
    with pytest.raises(UserError, match=r"ppo.stop.metric: a step has no 'm'; it has kl, n"):
        StopRule(StopSettings(metric="m", above=1.0)).reason({"n": 1.0, "kl": 2.0})
