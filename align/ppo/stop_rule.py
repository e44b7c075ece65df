"""When PPO ends before its last step: a rule on a logged figure."""

from collections.abc import Mapping
from dataclasses import dataclass

from align.config.schema import StopSettings
from policies.errors import UserError


@dataclass
class StopRule:
    """Watches one figure of every step. best: the highest so far; offences: steps in a row that broke the rule."""

    settings: StopSettings
    best: float = float("-inf")
    offences: float = 0

    def reason(self, metrics: Mapping[str, float]) -> str | None:
        """Why to stop after the step with these figures, in words; None to go on.

        Raises UserError where the step has no such figure.
        """
        rule = self.settings
        if rule.metric not in metrics:
            raise UserError(f"ppo.stop.metric: a step has no {rule.metric!r}; it has {', '.join(sorted(metrics))}")
        value = metrics[rule.metric]
        self.best = max(self.best, value)
        broken = [
            f"{word} {bound:g}"
            for word, bound, crossed in (
                ("above", rule.above, rule.above is not None and value > rule.above),
                ("below", rule.below, rule.below is not None and value < rule.below),
                ("under its best by", rule.falls_by, rule.falls_by is not None and value < self.best - rule.falls_by),
            )
            if crossed
        ]
        self.offences = self.offences + 1 if broken else 0
        if self.offences < rule.patience:
            return None
        return f"{rule.metric} is {value:.3g}, {' and '.join(broken)}, for {self.offences} steps"
