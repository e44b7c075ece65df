"""All that the learner holds: the trunk, the critic, and the heads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from policies.batching import Batch
from policies.heads import ScalarHead
from policies.layers.lora import parameter_groups_by_rate
from policies.logprobs import token_logprobs
from policies.trunk import Trunk


class Critic(nn.Module):
    """A scalar head on the hidden states of a role: of the shared trunk, or of a trunk of the critic's own."""

    def __init__(self, head: ScalarHead, role: str, trunk: Trunk | None = None) -> None:
        super().__init__()
        self.head, self.role, self.trunk = head, role, trunk


class Roles(nn.Module):
    """The trunk, the critic and the heads: all that the learner holds, and what DeepSpeed wraps.

    `forward` runs a function of this module, so that every pass over the weights, whatever it computes, is under
    DeepSpeed's hooks, which gather sharded parameters.
    """

    def __init__(
        self, trunk: Trunk, critic: Critic | None, rewards: Mapping[str, Sequence[ScalarHead]] = MappingProxyType({})
    ) -> None:
        """rewards: the heads on the states of each reward role."""
        super().__init__()
        self.trunk = trunk
        self.critic = critic
        self.reward_heads = nn.ModuleDict({role: nn.ModuleList(heads) for role, heads in rewards.items()})
        trunk.train_only("policy", *(["critic"] if "critic" in trunk.roles else []))
        if critic is not None and critic.trunk is not None:
            critic.trunk.train_only("critic")
        self.reward_heads.requires_grad_(False)
        self._named: dict[tuple[Any, ...], list[tuple[str, nn.Parameter]]] = {}

    def named_parameters(self, *options: Any, **named: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module, but looked up once: DeepSpeed asks for them several times a step."""
        key = options, *sorted(named.items())
        if key not in self._named:
            self._named[key] = list(super().named_parameters(*options, **named))
        return iter(self._named[key])

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self, *arguments)

    @property
    def critic_trunk(self) -> Trunk | None:
        """The trunk that holds the adapter `critic`, if there is such an adapter."""
        if self.critic is None or self.critic.role != "critic":
            return None
        return self.critic.trunk or self.trunk

    @property
    def trunks(self) -> list[Trunk]:
        """The shared trunk, and the critic's own where it has one."""
        own = None if self.critic is None else self.critic.trunk
        return [self.trunk] if own is None else [self.trunk, own]

    def microbatches(self, lengths: Sequence[int], tokens: int | None = None) -> list[list[int]]:
        """Indices of rows for passes of every role, see `Trunk.microbatches`; padding counts where one trunk pads."""
        return self.trunk.microbatches(lengths, tokens, padded=not all(trunk.supports_packing for trunk in self.trunks))

    def groups(self) -> tuple[dict[str, list[nn.Parameter]], dict[str, float]]:
        """What is trained, by role or ROLE.PART, and what a part's learning rate is a multiple of its role's by."""
        groups: dict[str, list[nn.Parameter]] = {"policy": [], **({} if self.critic is None else {"critic": []})}
        factors: dict[str, float] = {}
        for role, trunk in (("policy", self.trunk), ("critic", self.critic_trunk)):
            if trunk is None:
                continue
            for factor, parameters in parameter_groups_by_rate(trunk.adapter(role).items(), trunk.settings.lora_plus):
                name = role if factor == 1.0 else f"{role}.up"
                groups.setdefault(name, []).extend(parameters)
                factors[name] = factor
        if self.critic is not None:
            groups["critic"].extend(self.critic.head.parameters())
        return groups, factors

    def logprobs(self, role: str, states: Tensor, batch: Batch, temperature: float) -> Tensor:
        """Log-probabilities `[P]` of a batch's response tokens under a role's states `[N, H]`."""
        return token_logprobs(
            states[batch.predictors], batch.response_ids, partial(self.trunk.head, role=role), temperature
        )

    def reward_outputs(self, batch: Batch) -> Tensor:
        """What the reward heads say of a batch's rows `[B, C]`, role after role."""
        outputs = []
        for role, heads in self.reward_heads.items():
            states = self.trunk.hidden_packed(batch.ids, batch.lengths, role)[batch.last]
            outputs += [head(states) for head in heads.children()]
        return torch.stack(outputs, dim=-1)

    def critic_states(self, batch: Batch, policy_states: Tensor) -> Tensor:
        """Hidden states `[N, H]` under the critic's head; one forward pass more unless it reads the policy's."""
        trunk = self.critic_trunk
        return policy_states if trunk is None else trunk.hidden_packed(batch.ids, batch.lengths, "critic")
