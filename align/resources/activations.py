"""Estimates the bytes of activations: what training keeps of one microbatch until its backward pass is through."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from align.config.schema import Experiment
from align.resources.saved_tensors import SavedBytes, count_logits, count_packed, count_shared_prompts
from policies.build import base_without_weights, trunk_without_weights
from policies.probes import has_full_attention
from policies.schema import ModelSettings, OptimizerSettings
from policies.trunk import Trunk

ROLE = "policy"
"""The role that stands for all: their adapters are alike."""
FLOAT32_BYTES = 4
"""Bytes of a number that a scalar head reads."""


@dataclass(frozen=True)
class Microbatch:
    """The largest microbatch of a stage.

    Attributes:
        lengths: Tokens of each sequence.
        training: Whether modules are in training mode, as they are in the supervised stages.
        shares_prompts: Whether each sequence is a prompt with several responses to it.
    """

    lengths: tuple[int, ...]
    training: bool
    shares_prompts: bool

    @property
    def tokens(self) -> int:
        """Its tokens."""
        return sum(self.lengths)


def largest_lengths(tokens: int, longest: int, padded: bool) -> tuple[int, ...]:
    """The tokens of each sequence of the largest microbatch, in which sequences are as long as they may be.

    Args:
        tokens: The most tokens of a microbatch.
        longest: The most tokens of a sequence. One with more than `tokens` is a microbatch by itself.
        padded: Whether all sequences are padded to the length of the longest.
    """
    count, rest = divmod(max(tokens, longest), longest)
    lengths = (longest,) * count
    return lengths if padded or not rest else (*lengths, rest)


class ActivationEstimate:
    """Estimates the activations of an experiment's stages; what has been counted is not counted again.

    The methods for stages yield the names and the bytes of what a process holds while it trains on a microbatch, and
    raise NeedsDataError for a model that cannot be run without data. The logits of a chunk exist before the backward
    pass of the layers, and the layer that gradient checkpointing recomputes during it: then the sum is above the peak.
    """

    def __init__(self, experiment: Experiment, trunk: Trunk) -> None:
        """Prepare to count.

        Args:
            experiment: The settings, with `tokens_per_microbatch` of the stages whose methods are called.
            trunk: The experiment's trunk on the meta device, with the role `policy`.
        """
        self._experiment = experiment
        self._trunk = trunk
        self._counted: dict[tuple[Trunk, Microbatch], SavedBytes] = {}

    def sft(self) -> Iterator[tuple[str, float]]:
        """The activations of SFT."""
        settings = self._experiment.sft
        trunk = self._trunk_at(self._experiment.zero_of(settings))
        microbatch = _largest(trunk, settings, settings.max_tokens, training=True)
        passes = self._experiment.policy.spec.sft_passes
        saved = self._saved(trunk, microbatch) + _saved_by_likelihood(trunk, microbatch)  # of one pass
        yield _role(microbatch), passes * saved
        yield _logits(trunk, microbatch, learn_entropy=passes > 1)

    def classify(self) -> Iterator[tuple[str, float]]:
        """The activations of a classifier's training, whose head reads one token per sequence."""
        settings = self._experiment.classify
        trunk = self._trunk_at(self._experiment.zero_of(settings))
        microbatch = _largest(trunk, settings, settings.max_tokens, training=True)
        if settings.trains == "adapter":
            yield _role(microbatch), self._saved(trunk, microbatch)

    def dpo(self) -> Iterator[tuple[str, float]]:
        """The activations of preference optimisation: those of SFT on the responses of several rows."""
        settings = self._experiment.dpo
        trunk = self._trunk_at(self._experiment.zero_of(settings))
        microbatch = _largest(trunk, settings, settings.max_tokens, training=True)
        yield _role(microbatch), self._saved(trunk, microbatch) + _saved_by_likelihood(trunk, microbatch)
        yield _logits(trunk, microbatch)

    def reward(self) -> Iterator[tuple[str, float]]:
        """The activations of reward training, whose heads read one token per sequence.

        Where responses can follow one copy of their prompt, this is counted: the mask of their attention is saved.
        """
        settings = self._experiment.reward
        trunk = self._trunk_at(self._experiment.zero_of(settings))
        microbatch = _largest(
            trunk,
            settings,
            settings.max_tokens,
            training=True,
            shares_prompts=has_full_attention(trunk.causal) and trunk.settings.spec.prompt_kind is None,
        )
        if settings.trains == "adapter":
            yield _role(microbatch), self._saved(trunk, microbatch)

    def ppo(self) -> Iterator[tuple[str, float]]:
        """The activations of PPO.

        The objectives of policy and critic are differentiated one after another, but together at ZeRO 3.
        """
        experiment = self._experiment
        learner = experiment.learner
        trunk = self._trunk_at(learner.zero)
        longest = experiment.rollouts.max_prompt_tokens + experiment.rollouts.max_new_tokens
        microbatch = _largest(trunk, learner, longest, training=False)
        policy = self._saved(trunk, microbatch) + _saved_by_likelihood(trunk, microbatch)
        critic = 0
        kind = experiment.ppo.critic.kind if experiment.ppo.has_critic else None
        if kind == "head":
            policy += _saved_by_values(trunk, microbatch)
        elif kind is not None:
            critic_trunk = self._critic_trunk or trunk
            critic = self._saved(critic_trunk, microbatch) + _saved_by_values(critic_trunk, microbatch)
        yield _role(microbatch), policy + critic if learner.zero == 3 else max(policy, critic)
        yield _logits(trunk, microbatch, learn_entropy=experiment.ppo.entropy_coefficient > 0)

    def _trunk_at(self, zero: int) -> Trunk:
        return self._trunk_of_modules if zero == 3 else self._trunk

    @cached_property
    def _trunk_of_modules(self) -> Trunk:
        """The trunk as it is at ZeRO 3."""
        return self._build(self._experiment.model, zero=3)

    @cached_property
    def _critic_trunk(self) -> Trunk | None:
        """The trunk of a critic on a base model that is not the policy's."""
        experiment = self._experiment
        path = experiment.ppo.critic.model
        if path is None:
            return None
        return self._build(experiment.model.model_copy(update={"path": path}), experiment.learner.zero)

    def _build(self, model: ModelSettings, zero: int) -> Trunk:
        policy = self._experiment.policy
        trunk = trunk_without_weights(base_without_weights(model, policy), policy, (ROLE,))
        if zero == 3:
            trunk.use_module_forwards()
        return trunk

    def _saved(self, trunk: Trunk, microbatch: Microbatch) -> int:
        """The bytes that a forward pass of the trunk saves."""
        key = trunk, microbatch
        if key not in self._counted:
            trunk.train(microbatch.training)
            count = count_shared_prompts if microbatch.shares_prompts else count_packed
            self._counted[key] = count(trunk, ROLE, microbatch.lengths)
        saved = self._counted[key]
        return saved.checkpointed if self._experiment.model.gradient_checkpointing else saved.all_layers


def _largest(
    trunk: Trunk, settings: OptimizerSettings, longest: int, training: bool, shares_prompts: bool = False
) -> Microbatch:
    """The largest microbatch."""
    assert settings.tokens_per_microbatch is not None
    padded = shares_prompts or not trunk.supports_packing
    lengths = largest_lengths(settings.tokens_per_microbatch, longest, padded)
    return Microbatch(lengths, training, shares_prompts)


def _role(microbatch: Microbatch) -> str:
    return f"activations, {microbatch.tokens:,} tokens per microbatch"


def _saved_by_likelihood(trunk: Trunk, microbatch: Microbatch) -> int:
    """The gradient of the hidden states, computed in the forward pass; if the LM head is trained, the states."""
    return microbatch.tokens * trunk.width * trunk.causal.dtype.itemsize


def _saved_by_values(trunk: Trunk, microbatch: Microbatch) -> int:
    """The hidden states that a scalar head reads."""
    return microbatch.tokens * trunk.width * FLOAT32_BYTES


def _logits(trunk: Trunk, microbatch: Microbatch, learn_entropy: bool = False) -> tuple[str, float]:
    return "logits of a chunk", count_logits(trunk, ROLE, microbatch.tokens, learn_entropy)
