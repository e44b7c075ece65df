"""The settings of preference optimisation."""

from typing import Literal

from pydantic import Field, model_validator

from policies.schema import unread_settings
from rewards.schema import FitSettings

DEFAULT_BETA = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "simpo": 2.0}
"""β of each loss where it is unset, as in the papers."""


class DpoSettings(FitSettings):
    """Preference optimisation: the policy learns from preferences, without a reward model and without rollouts."""

    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    loss: Literal["dpo", "ipo", "kto", "simpo"] = Field(
        "dpo",
        description="dpo: Bradley and Terry's likelihood, Plackett and Luce's of rankings; ipo: a squared distance, "
        "which does not grow without bound; kto: of single responses, good or bad; simpo: by the mean "
        "log-probability per token, without a reference",
    )
    beta: float | None = Field(
        None,
        gt=0,
        description="strength of the KL penalty (dpo, ipo), or scale of the reward; unset: 0.1, and 2 for simpo",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of the comparisons that are assumed to be wrong (conservative DPO)"
    )
    margin: float | None = Field(
        None, ge=0, description="simpo: by how much the reward of the chosen response should be higher; unset: 1"
    )
    desirable_weight: float | None = Field(None, gt=0, description="kto: weight of the good responses; unset: 1")
    undesirable_weight: float | None = Field(None, gt=0, description="kto: weight of the bad responses; unset: 1")

    @property
    def effective_beta(self) -> float:
        """β, or its default for the loss."""
        return self.beta or DEFAULT_BETA[self.loss]

    @property
    def effective_margin(self) -> float:
        """SimPO's margin γ, or its default."""
        return 1.0 if self.margin is None else self.margin

    @property
    def uses_reference(self) -> bool:
        """Whether the loss needs the reference's log-probabilities."""
        return self.loss != "simpo"

    @model_validator(mode="after")
    def _are_read(self) -> "DpoSettings":
        for name, loss in {"margin": "simpo", "desirable_weight": "kto", "undesirable_weight": "kto"}.items():
            if getattr(self, name) is not None and self.loss != loss:
                raise unread_settings(f"`{name}` has no effect with `loss: {self.loss}`, only with {loss}", name)
        if self.label_smoothing and self.loss == "kto":
            raise unread_settings("`label_smoothing` has no effect with `loss: kto`", "label_smoothing")
        return self
