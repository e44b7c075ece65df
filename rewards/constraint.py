"""The settings of a bound on a term of the reward."""

from pydantic import Field

from policies.schema import Settings


class ConstraintSettings(Settings):
    """A bound on a cost: the reward is maximised subject to a mean cost of at most `at_most`.

    A multiplier λ ≥ 0 grows while the mean cost is above the bound, and the score is (reward - λ · cost) / (1 + λ)
    (Dai et al. 2024, "Safe RLHF", eq. 9 and 10).
    """

    term: str = Field(description="the term that is the cost; it is not part of the sum")
    at_most: float = Field(description="bound on the mean cost")
    rate: float = Field(0.1, gt=0, description="growth of the multiplier per step, for each unit above the bound")
    start: float = Field(0.0, ge=0, description="initial value of the multiplier")
