"""The modules of the learner: the shared base model with its adapters, the critic, and the reward heads.

    Roles
    ├── trunk           the shared base model with one adapter per role: policy, reference, critic, reward, …
    ├── critic          a scalar head, on the policy's states, on those of the adapter `critic`,
    │                   or on a trunk of its own
    └── reward_heads    per reward role: scalar heads on the states of its adapter

Shapes: B sequences of a batch, N their packed tokens, P their response tokens, H hidden size, C reward heads.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from align.roles.trained import TrainedModule
from policies.batching import Batch
from policies.heads import ScalarHead
from policies.logprobs import token_logprobs
from policies.trunk import Trunk


class Critic(nn.Module):
    """A scalar head on the hidden states of a role, on the shared base model or on its own."""

    def __init__(self, head: ScalarHead, role: str, trunk: Trunk | None = None) -> None:
        """Attach the head to a role.

        Args:
            head: The value head.
            role: The role whose hidden states the head reads, `policy` or `critic`.
            trunk: The critic's own base model; None: the shared one.
        """
        super().__init__()
        self.head = head
        self.role = role
        self.trunk = trunk


class Roles(TrainedModule):
    """All modules of PPO's learner, of which the policy and the critic are trained."""

    def __init__(
        self,
        trunk: Trunk,
        critic: Critic | None,
        rewards: Mapping[str, Sequence[ScalarHead]] = MappingProxyType({}),
        reads_tokens: bool = False,
    ) -> None:
        """Put the modules together.

        Args:
            trunk: The shared base model with its adapters.
            critic: None where the advantage estimator needs none.
            rewards: The heads of each reward role.
            reads_tokens: Whether the one reward head is that of a process reward model, and is read at each token.
        """
        super().__init__()
        self.reads_tokens = reads_tokens
        self.trunk = trunk
        self.critic = critic
        self.reward_heads = nn.ModuleDict({role: nn.ModuleList(heads) for role, heads in rewards.items()})
        trained = ["policy", "critic"] if "critic" in trunk.roles else ["policy"]
        trunk.train_only(*trained)
        if critic is not None and critic.trunk is not None:
            critic.trunk.train_only("critic")
        self.reward_heads.requires_grad_(False)

    @property
    def critic_trunk(self) -> Trunk | None:
        """The trunk that has the adapter `critic`; None where there is no such adapter."""
        if self.critic is None or self.critic.role != "critic":
            return None
        return self.critic.trunk or self.trunk

    @property
    def trunks(self) -> list[Trunk]:
        """The shared trunk, and the critic's own where it has one."""
        if self.critic is None or self.critic.trunk is None:
            return [self.trunk]
        return [self.trunk, self.critic.trunk]

    @property
    def trained_adapters(self) -> dict[str, Trunk]:
        """The policy's trunk, and the critic's where it has an adapter."""
        critic_trunk = self.critic_trunk
        return {"policy": self.trunk} if critic_trunk is None else {"policy": self.trunk, "critic": critic_trunk}

    @property
    def trained_heads(self) -> dict[str, nn.Module]:
        """The critic's head."""
        return {} if self.critic is None else {"critic": self.critic.head}

    def logprobs(self, role: str, states: Tensor, batch: Batch, temperature: float) -> Tensor:
        """Log-probabilities `[P]` of a batch's response tokens, in nats, from a role's hidden states `[N, H]`."""
        head = partial(self.trunk.head, role=role)
        return token_logprobs(states[batch.predictors], batch.response_ids, head, temperature)

    def reward_outputs(self, batch: Batch) -> Tensor:
        """Outputs `[B, C]` of the reward heads at the last token of each sequence; one forward pass per reward role."""
        outputs: list[Tensor] = []
        for role, heads in self.reward_heads.items():
            states = self.trunk.hidden_packed(batch.ids, batch.lengths, role)[batch.last]  # [N, H] -> [B, H]
            outputs += [head(states) for head in heads.children()]  # [B] each
        return torch.stack(outputs, dim=-1)  # [B, C]

    def token_scores(self, batch: Batch) -> Tensor:
        """Outputs `[P]` of the process reward model's head at each response token."""
        [(role, heads)] = self.reward_heads.items()
        [head] = heads.children()
        states = self.trunk.hidden_packed(batch.ids, batch.lengths, role)  # [N, H]
        scores: Tensor = head(states[batch.predictors + 1])  # [N, H] -> [P, H] -> [P]; each token follows its predictor
        return scores

    def critic_states(self, batch: Batch, policy_states: Tensor) -> Tensor:
        """Hidden states `[N, H]` that the critic's head reads; one more forward pass unless they are the policy's."""
        trunk = self.critic_trunk
        return policy_states if trunk is None else trunk.hidden_packed(batch.ids, batch.lengths, "critic")
