"""The settings of PPO: section `ppo` of an experiment."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from align.config.estimators import ESTIMATORS, POLICY_LOSSES, READABLE, find_estimator, user_function
from policies.errors import UserError
from policies.schema import Settings, listed, unread_settings

USER_FUNCTION = "user_function"
"""The type of pydantic's error where a user's function cannot be loaded."""


@contextmanager
def _as_validation_error(key: str) -> Iterator[None]:
    """Turn a UserError about a setting into an error of pydantic, so that it is listed with the file and line."""
    try:
        yield
    except UserError as error:
        message = str(error).removeprefix(f"{key}: ")
        raise PydanticCustomError(USER_FUNCTION, "{message}", {"message": message}) from error


class KlSettings(Settings):
    """The KL penalty to the reference policy."""

    where: Literal["reward", "loss"] | None = Field(
        None,
        description="reward: subtracted from the reward of each token; loss: a term of the policy loss; unset: loss "
        "with the estimator grpo, reward with the others",
    )
    estimator: Literal["k1", "k2", "k3"] | None = Field(
        None,
        description="estimator of the KL per token (Schulman 2020); unset: k1 in the reward, k2 in the loss, where its "
        "expected gradient is that of the KL",
    )
    coefficient: float = Field(0.05, ge=0, description="weight of the penalty; with a target, its initial value")
    target: float | None = Field(
        None,
        gt=0,
        description="KL in nats per sequence that the adaptive controller aims for; unset: the coefficient is fixed",
    )
    horizon: int = Field(10_000, ge=1, description="episodes over which the adaptive controller acts")

    @model_validator(mode="after")
    def _has_a_gradient(self) -> "KlSettings":
        if self.where == "loss" and self.estimator == "k1":
            raise ValueError("k1 in the loss has a gradient of mean zero and would penalize nothing: use k2 or k3")
        return self

    def resolved(self, in_loss: bool) -> "KlSettings":
        """These settings with `where` and `estimator` set.

        Args:
            in_loss: Whether the KL is in the loss where neither `where` nor the estimator k1 says otherwise.
        """
        where = self.where or ("loss" if in_loss and self.estimator != "k1" else "reward")
        estimator = self.estimator or ("k2" if where == "loss" else "k1")
        return self.model_copy(update={"where": where, "estimator": estimator})


class CriticSettings(Settings):
    """The critic. It is built only for an estimator that needs values."""

    kind: Literal["adapter", "head", "model"] = Field(
        "adapter",
        description="adapter: on the shared base model; head: on the policy's hidden states; model: a separate model",
    )
    model: str | None = Field(
        None, description="kind model: folder or hub name of the critic's base model; unset: the policy's"
    )
    coefficient: float | None = Field(
        None, gt=0, description="weight of the value loss; unset: 1, or 0.1 where it shares the policy's weights"
    )
    value_clip: float | None = Field(
        0.2, gt=0, description="largest change of a value from the old one; unset: no clipping"
    )
    warmup: int = Field(0, ge=0, description="initial steps that train the critic alone")

    @property
    def weight(self) -> float:
        """The effective coefficient."""
        return self.coefficient or (0.1 if self.kind == "head" else 1.0)

    @model_validator(mode="after")
    def _consistent(self) -> "CriticSettings":
        if self.model and self.kind != "model":
            raise ValueError(f"`model` is the base of a critic of kind `model`, and kind is `{self.kind}`")
        return self


class StopSettings(Settings):
    """A rule on a metric of each step that stops PPO early. The policy is the best evaluated one, as always."""

    metric: str = Field(
        description="a name in metrics.jsonl, such as reward/spread, reward/gold_mean or kl/per_sequence"
    )
    above: float | None = Field(None, description="stop where the metric is above this value")
    below: float | None = Field(None, description="stop where the metric is below this value")
    falls_by: float | None = Field(
        None, gt=0, description="stop where the metric is this much below its highest value so far"
    )
    patience: int = Field(1, ge=1, description="consecutive steps for which the rule must hold")

    @model_validator(mode="after")
    def _says_when(self) -> "StopSettings":
        if self.above is None and self.below is None and self.falls_by is None:
            raise ValueError("set at least one of above, below and falls_by")
        return self


class PpoSettings(Settings):
    """Proximal policy optimization. Sizes are in episodes (one prompt with one response)."""

    steps: int = Field(50, ge=1, description="rounds of rollout and update")
    batch_size: int = Field(128, ge=1, description="episodes per step")
    samples_per_prompt: int = Field(
        1, ge=1, description="episodes per prompt; rloo and grpo compare the episodes of one prompt"
    )
    epochs: int = Field(2, ge=1, description="how often a step trains on each of its episodes")
    minibatches: int = Field(4, ge=1, description="optimizer steps per epoch")
    estimator: str = Field(
        "gae",
        description="of advantages: gae (the only one with a critic), rloo, grpo, reinforce++ or FILE.py:function",
    )
    policy_loss: str = Field("clip", description="clip: the clipped surrogate of PPO; or FILE.py:function")
    gamma: float = Field(1.0, gt=0, le=1, description="discount per token, in gae and reinforce++")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="lambda of generalized advantage estimation")
    whiten_advantages: bool | None = Field(
        None, description="over the batch; unset: as in the estimator's paper, so for gae and reinforce++"
    )
    whiten_rewards: bool = Field(
        False, description="scale the token rewards of a batch to standard deviation 1 about their mean"
    )
    loss_aggregation: Literal["token_mean", "sequence_mean"] = Field(
        "token_mean", description="mean over all tokens, or mean over sequences of the mean over each one's tokens"
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped at 1 - clip_low")
    clip_high: float = Field(0.2, gt=0, description="the ratio is clipped at 1 + clip_high")
    dual_clip: float | None = Field(
        None, gt=1, description="bound on the ratio where the advantage is negative; unset: no bound"
    )
    entropy_coefficient: float = Field(0.0, ge=0, description="coefficient of the entropy bonus")
    importance_ratio_cap: float | None = Field(
        None,
        gt=0,
        description="truncated importance sampling: weight tokens by the ratio of learner to sampler probability, "
        "capped at this value; unset: no weights",
    )
    max_mismatch: float | None = Field(
        None,
        gt=0,
        description="the run stops when sampler and learner differ by more nats per token on average; unset: by more "
        "than the rounding of the model's dtype can explain",
    )
    ptx_coefficient: float = Field(
        0.0, ge=0, description="weight of the likelihood of demonstrations, mixed into each update"
    )
    target_kl: float | None = Field(
        None, gt=0, description="an update ends early once the new policy's mean KL per token to the old passes this"
    )
    on_truncation: Literal["score", "bootstrap"] = Field(
        "score", description="responses truncated at max_new_tokens: scored and terminal, or unscored and bootstrapped"
    )
    truncation_penalty: float = Field(
        0.0, ge=0, description="subtracted from the score of a truncated response (with on_truncation: score)"
    )
    length_penalty: float = Field(
        0.0, description="subtracted from the score for each response token; negative: a bonus"
    )
    stop: StopSettings | None = Field(None, description="a rule that stops PPO early; unset: none")
    kl: KlSettings = Field(KlSettings(), validate_default=True)
    critic: CriticSettings = CriticSettings()

    @property
    def has_critic(self) -> bool:
        """Whether a critic is built and trained."""
        return find_estimator(self.estimator).has_critic

    @property
    def active_critic(self) -> CriticSettings | None:
        """The settings of the critic that is built."""
        return self.critic if self.has_critic else None

    @property
    def kl_estimator(self) -> str:
        """The estimator of the KL, which validation has resolved."""
        assert self.kl.estimator is not None
        return self.kl.estimator

    @property
    def whitens_advantages(self) -> bool:
        """Whether advantages are whitened over the batch."""
        if self.whiten_advantages is None:
            return find_estimator(self.estimator).whitens
        return self.whiten_advantages

    @field_validator("estimator")
    @classmethod
    def _known_estimator(cls, name: str) -> str:
        if name not in ESTIMATORS and ":" not in name:
            raise ValueError(f"expected {', '.join(ESTIMATORS)} or FILE.py:function")
        user_function.cache_clear()  # in a notebook the file may have changed since it was last loaded
        with _as_validation_error("ppo.estimator"):
            find_estimator(name)
        return name

    @field_validator("kl")
    @classmethod
    def _resolved_kl(cls, kl: KlSettings, validated: ValidationInfo) -> KlSettings:
        """Choose what is unset by the estimator, so that `config.yaml` and all that reads the settings have it."""
        if "estimator" not in validated.data:  # it is not valid, which is told anyway
            return kl
        return kl.resolved(in_loss=find_estimator(validated.data["estimator"]).kl_in_loss)

    @field_validator("policy_loss")
    @classmethod
    def _known_policy_loss(cls, name: str) -> str:
        if name not in POLICY_LOSSES and ":" not in name:
            raise ValueError(f"expected {', '.join(POLICY_LOSSES)} or FILE.py:function")
        if name not in POLICY_LOSSES:
            with _as_validation_error("ppo.policy_loss"):
                user_function(name, "ppo.policy_loss")
        return name

    @model_validator(mode="after")
    def _batch_divides(self) -> "PpoSettings":
        for name in ("minibatches", "samples_per_prompt"):
            if self.batch_size % getattr(self, name):
                raise ValueError(f"{name} {getattr(self, name)} does not divide batch_size {self.batch_size}")
        return self

    @model_validator(mode="after")
    def _estimator_fits(self) -> "PpoSettings":
        estimator = find_estimator(self.estimator)
        if self.samples_per_prompt < estimator.min_samples:
            raise ValueError(
                f"{self.estimator} compares the samples of a prompt: set samples_per_prompt to "
                f"{estimator.min_samples} or more"
            )
        if not estimator.has_critic and self.critic != CriticSettings():
            raise unread_settings(f"{self.estimator} has no critic: remove `critic`", "critic")
        defaults = {name: type(self).model_fields[name].default for name in READABLE if name not in estimator.reads}
        if unread := [name for name, default in defaults.items() if getattr(self, name) != default]:
            readers = [other.name for other in ESTIMATORS.values() if set(unread) <= set(other.reads)]
            raise unread_settings(
                f"{self.estimator} does not read {listed(unread)}: remove {'it' if len(unread) == 1 else 'them'}, "
                f"or use {' or '.join(readers)}",
                *unread,
            )
        return self

    @model_validator(mode="after")
    def _truncation_fits(self) -> "PpoSettings":
        if self.on_truncation == "bootstrap" and not self.has_critic:
            raise ValueError(
                f"`on_truncation: bootstrap` needs a critic, and {self.estimator} has none: use `on_truncation: score`"
            )
        if self.on_truncation == "bootstrap" and self.truncation_penalty:
            raise unread_settings(
                "truncation_penalty is subtracted from a score, and `on_truncation: bootstrap` gives none: "
                "remove one of the two",
                "truncation_penalty",
                "on_truncation",
            )
        return self
