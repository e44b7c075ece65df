"""When PPO stops before its last step: a rule on a logged metric."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from align.config.ppo_settings import StopSettings
from policies.errors import UserError


class StopCondition(Protocol):
    """Decides after every step whether PPO stops early."""

    def reason(self, metrics: Mapping[str, float]) -> str | None:
        """Why to stop after the step with these metrics; None to continue."""
        ...

    def state(self) -> list[float]:
        """The numbers that a checkpoint keeps."""
        ...


class NoStopRule:
    """Lets PPO run to its last step."""

    def reason(self, metrics: Mapping[str, float]) -> str | None:
        return None

    def state(self) -> list[float]:
        return []


@dataclass
class StopRule:
    """Watches one metric of every step.

    Attributes:
        settings: The metric, its bounds and the patience.
        best: The highest value so far.
        violations: Number of consecutive steps that broke the rule.
    """

    settings: StopSettings
    best: float = float("-inf")
    violations: float = 0

    def reason(self, metrics: Mapping[str, float]) -> str | None:
        """Why to stop after the step with these metrics; None to continue.

        Raises:
            UserError: The step has no such metric.
        """
        metric = self.settings.metric
        if metric not in metrics:
            raise UserError(f"ppo.stop.metric: a step has no {metric!r}; it has {', '.join(sorted(metrics))}")
        value = metrics[metric]
        self.best = max(self.best, value)
        broken = self._broken_bounds(value)
        self.violations = self.violations + 1 if broken else 0
        if self.violations < self.settings.patience:
            return None
        steps = "1 step" if self.violations == 1 else f"{self.violations:g} consecutive steps"
        return f"{metric} is {value:.3g}, {' and '.join(broken)}, for {steps}"

    def state(self) -> list[float]:
        """The values of `best` and `violations`, from which a resumed run rebuilds the rule."""
        return [self.best, self.violations]

    def _broken_bounds(self, value: float) -> list[str]:
        """The bounds that a value breaks, in words."""
        rule = self.settings
        broken = []
        if rule.above is not None and value > rule.above:
            broken.append(f"above {rule.above:g}")
        if rule.below is not None and value < rule.below:
            broken.append(f"below {rule.below:g}")
        if rule.falls_by is not None and value < self.best - rule.falls_by:
            broken.append(f"more than {rule.falls_by:g} below its highest value")
        return broken
