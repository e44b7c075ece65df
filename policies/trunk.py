"""One frozen base model and, for each role, what is trained of it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from policies.batching import collate, collate_shared_prompts, length_buckets
from policies.errors import UserError
from policies.files.adapters import save_adapter
from policies.layers.attention import NAME, use_own_attention
from policies.layers.packing import PackedSequences, PaddedBlock
from policies.layers.rms_norm import FrozenRmsNorm
from policies.layers.rotary import use_own_rotation
from policies.layers.swiglu import GatedPart
from policies.schema import PolicySettings

CPU_BYTES = 8192
"""Tokens of a pass on a CPU, times the bytes of a number: so few that activations stay in its caches."""
ALIKE = 32
"""Numbers of tokens in bfloat16 on a CPU are multiples of it: so few that all they need is kept, at 2 % of a pass."""
ANY_MASK = (1, 1, 1, 1)
"""Shape of a mask that models take as it is, and that attention to rows without padding never looks at."""

AdapterWeights = dict[str, Tensor]
"""What is trained of a role, by name in its file; the names do not hold the role."""


class Trunk(nn.Module, ABC):
    """A causal language model whose frozen weights several roles share.

    Each role has an adapter: what `policy.method` trains, and no other role sees. A role without an adapter of its own
    is the base model as it is. The base's tensors exist once whatever the number of roles.
    """

    supports_continuous_batching = True
    """Whether rows decoded apart may go on in one batch, padded on the left."""

    def __init__(self, base: PreTrainedModel, settings: PolicySettings, roles: tuple[str, ...]) -> None:
        """roles: those that have an adapter. Each starts as one that changes nothing; soft prompts all start alike.

        Raises UserError where the method finds nothing to train in this model.
        """
        super().__init__()
        self.width: int = base.get_input_embeddings().weight.shape[1]
        self.roles = roles
        self.settings, self.base = settings, base.config.name_or_path
        self._role = roles[0]
        self._recomputed: list[nn.Module] = []
        self._softcap: float | None = getattr(base.config, "final_logit_softcapping", None)
        self.causal = base
        use_own_attention(base)
        use_own_rotation(base)
        for own in (FrozenRmsNorm, GatedPart):
            for module in filter(own.fits, base.modules()):
                module.forward = own(module)
        self._build(base)
        self.train_only()
        self.eval()
        if self.causal.device.type != "meta":  # a model without weights is only counted
            self._check_head()
        self.supports_packing = self._supports_packing()

    @abstractmethod
    def _build(self, base: PreTrainedModel) -> None:
        """Make the adapters of `self.roles`."""

    @abstractmethod
    def switch(self, role: str) -> None:
        """Make the next forward passes those of a role, without copying a weight."""

    @abstractmethod
    def adapter(self, role: str) -> dict[str, nn.Parameter]:
        """The live parameters of a role's adapter by their name in its file."""

    def train_only(self, *roles: str) -> None:
        """Let gradients flow to the adapters of these roles and to nothing else."""
        self.requires_grad_(False)
        for role in roles:
            for parameter in self.adapter(role).values():
                parameter.requires_grad_(True)

    def hidden(self, ids: Tensor, role: str) -> Tensor:
        """Last hidden states `[B, T, H]` of rows `[B, T]` under a role's adapter.

        Rows may be padded on the right: attention is causal, so no real position sees padding.
        """
        self.switch(role)
        return self.states(input_ids=ids, use_cache=False)

    def hidden_packed(self, ids: Tensor, lengths: Tensor, role: str) -> Tensor:
        """Last hidden states `[N, H]` of rows of any length that stand one after another `[N]`.

        lengths: `[B]` int64, tokens of each row. Without padding where the model can (`supports_packing`), and there attention
        alone is by row.
        """
        tokens = lengths.tolist()
        if not self.supports_packing:
            block = PaddedBlock.of(tokens, ids.device)
            return block.unpad(self.hidden(block.pad(ids), role))
        self.switch(role)
        filler = -len(ids) % self._multiple
        rows = PackedSequences.of([*tokens, filler] if filler else tokens, ids.device)
        return self._states_of(nn.functional.pad(ids, (0, filler)), rows)[: len(ids)]

    @property
    def _multiple(self) -> int:
        """What the number of tokens of a pass is a multiple of, by a row that nobody reads.

        oneDNN compiles its products in bfloat16 for each number of tokens that is new to it.
        """
        return ALIKE if self.causal.dtype == torch.bfloat16 and self.causal.device.type == "cpu" else 1

    def _states_of(self, ids: Tensor, rows: PackedSequences) -> Tensor:
        states = self.states(
            input_ids=ids[rows.order].unsqueeze(0),
            position_ids=rows.positions.unsqueeze(0),
            attention_mask=torch.ones(ANY_MASK, dtype=torch.bool, device=ids.device),
            use_cache=False,
            rows=rows,
        )
        return states.squeeze(0).index_select(0, rows.back)

    def _sees_all(self) -> bool:
        """Whether there are weights, and attention reaches back over a whole row: through no sliding window."""
        window = getattr(self.causal.config.get_text_config(), "sliding_window", None)
        return not window and self.causal.device.type != "meta"

    @torch.no_grad()
    def _supports_packing(self) -> bool:
        """Whether this model gives rows without padding between them the states that it gives each row alone.

        Not every family hands what it is given on to its attention; sliding windows are in the mask.
        """
        if self.causal.config._attn_implementation != NAME or not self._sees_all():
            return False
        lengths = [5, 2, 3]
        ids = torch.arange(10, device=self.causal.device) % self.causal.config.get_text_config().vocab_size
        self.switch("")
        try:
            together = self._states_of(ids, PackedSequences.of(lengths, ids.device))
        except (TypeError, ValueError, RuntimeError):
            return False
        apart = torch.cat([self.hidden(row.unsqueeze(0), "").squeeze(0) for row in ids.split(lengths)])
        return states_agree(together, apart)

    def microbatches(self, lengths: Sequence[int], tokens: int | None = None, padded: bool = False) -> list[list[int]]:
        """Indices of rows for passes of at most so many tokens each, or as many as suit the device.

        padded: whether the rows are padded even where the model `supports_packing`; padding counts then, see `length_buckets`.
        """
        return length_buckets(lengths, tokens or self.default_microbatch_tokens(), padded or not self.supports_packing)

    def hidden_shared_prompts(self, ids: Tensor, positions: Tensor, seen: Tensor, role: str) -> Tensor:
        """Last hidden states `[B, T, H]` of the rows of `SharedPromptBatch`; see `supports_shared_prompts`."""
        self.switch(role)
        return self.states(input_ids=ids, position_ids=positions, attention_mask=seen, use_cache=False)

    @torch.no_grad()
    def supports_shared_prompts(self, role: str) -> bool:
        """Whether this model gives a response behind a shared prompt the states that it has behind its own.

        Not every family heeds a mask and positions that it is given; sliding windows count what lies between.
        """
        if not self._sees_all():
            return False
        prompt, one, other = [5, 6, 7], [8, 9], [10, 11, 12]
        branches = collate_shared_prompts([prompt], [[one, other]])
        device, alone = self.causal.device, collate([prompt, prompt], [one, other])
        ids, positions, seen = branches.ids.to(device), branches.positions.to(device), branches.seen.to(device)
        try:
            together = self.hidden_shared_prompts(ids, positions, seen, role).flatten(0, 1)[branches.last]
        except (TypeError, ValueError, RuntimeError):
            return False
        apart = self.hidden_packed(alone.ids.to(device), alone.lengths.to(device), role)[alone.last]
        return torch.allclose(together, apart, rtol=1e-3, atol=1e-3)

    def states(self, **inputs: Any) -> Tensor:
        """Last hidden states of what the base model is given, under the adapter in use."""
        # transformers recomputes only in layers in training mode, and drops the cache there: only these modules
        # are put in it, nothing below them, so that dropout stays off, and only while gradients flow.
        for layer in self._recomputed:
            layer.training = torch.is_grad_enabled()
        return self._model_of(self._role).base_model(**inputs).last_hidden_state

    def next_states(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Last hidden states `[B, H]` of one new token a row, `[B]`, under the adapter in use.

        positions: `[B, 1]` int64; mask: `[B, S]` int64, 1 where a token may be seen, the new ones last. The new tokens'
        keys and values go into the cache.
        """
        inputs = {"input_ids": ids.unsqueeze(1), "attention_mask": mask, "position_ids": positions}
        return self.states(**inputs, past_key_values=cache, use_cache=True)[:, -1]

    def head(self, hidden: Tensor, role: str) -> Tensor:
        """Logits `[..., V]` of a role's hidden states `[..., H]`."""
        logits = self._model_of(role).get_output_embeddings()(hidden)
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def _model_of(self, role: str) -> PreTrainedModel:
        return self.causal

    def read_adapter(self, role: str) -> AdapterWeights:
        """A copy of a role's adapter."""
        return {name: parameter.detach().clone() for name, parameter in self.adapter(role).items()}

    @torch.no_grad()
    def write_adapter(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Overwrite a role's adapter; a merged role is so no longer.

        Raises UserError where names or shapes are not those of this trunk.
        """
        own = self.adapter(role)
        if own.keys() != weights.keys():
            odd = sorted(own.keys() ^ weights.keys())
            raise UserError(
                f"the adapter is made for another base or other targets: {odd[0]} and {len(odd) - 1} more names differ"
            )
        for name, parameter in own.items():
            if parameter.shape != weights[name].shape:
                shapes = f"{tuple(weights[name].shape)}, here it is {tuple(parameter.shape)}"
                raise UserError(f"the adapter's {name} is {shapes}: another base, or other sizes in `policy`")
            parameter.copy_(weights[name])

    def default_microbatch_tokens(self) -> int:
        """How many tokens a forward and backward pass should have on this device.

        On a GPU as many as a third of the free memory holds, by 34 numbers a token and unit of width in each layer
        (Korthikanti et al. 2022, section 4.1), a power of two.
        """
        least = CPU_BYTES // self.causal.dtype.itemsize
        if self.causal.device.type != "cuda":
            return least
        free, _ = torch.cuda.mem_get_info(self.causal.device)
        config = self.causal.config
        numbers = 34 * config.num_hidden_layers * self.width + 3 * config.vocab_size
        return max(least, 2 ** int(math.log2(free / 3 / (numbers * self.causal.dtype.itemsize))))

    def save(self, role: str, folder: Path) -> None:
        """Write what is trained of a role (see `save_adapter`)."""
        save_adapter(folder, self.read_adapter(role), self.settings, self.base)

    def merge(self, role: str) -> None:
        """From now on, a role's passes may use a copy of the weights with its adapter, as it now is, in them.

        They are faster then, and give no gradient. Nothing changes where the method has nothing to merge.
        """

    def initialise(self, *roles: str) -> None:
        """Give roles that start from no saved adapter the start that `policy.init` asks for."""

    def start_training(self, role: str) -> None:
        """Called where a supervised stage trains a role from nothing, before `train_only`."""

    def merged_parameter_count(self) -> int:
        """How many numbers `merge` makes of one role."""
        return 0

    def merged_weights(self, role: str) -> dict[str, Tensor]:
        """The base's weights as a role changes them, by name in the base, none in four bits.

        The trunk is of no use afterwards. Raises UserError where the method does more than change weights.
        """
        raise UserError(
            f"policy.method {self.settings.method} cannot be merged into the weights: export it as it is, "
            "for `policies.methods` to load"
        )

    def use_module_forwards(self) -> None:
        """Let every weight be used by the module that holds it: sharding by ZeRO 3 hooks on these."""

    def enable_gradient_checkpointing(self) -> None:
        """From now on, where gradients flow, recompute activations in the backward pass: less memory, more time."""
        self.causal.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": self._recompute_as_now})
        self._recomputed = [m for m in self.causal.modules() if isinstance(m, GradientCheckpointingLayer)]

    def _recompute_as_now(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a layer's forward pass and of its recomputation, which must be under the same role."""
        return nullcontext(), self._acting_as(self._role)

    @contextmanager
    def _acting_as(self, role: str) -> Iterator[None]:
        before = self._role
        self.switch(role)
        try:
            yield
        finally:
            self.switch(before)

    @torch.no_grad()
    def _check_head(self) -> None:
        """The head made by hand must be the model's own, or log-probabilities would be wrong in silence."""
        ids = torch.arange(4).unsqueeze(0).to(self.causal.device)
        self.switch("")
        own = self.causal(input_ids=ids, use_cache=False).logits.float()
        ours = self.head(self.hidden(ids, ""), "").float()
        if not torch.allclose(own, ours, rtol=1e-2, atol=1e-2):
            raise UserError(
                f"{type(self.causal).__name__} does more to its logits than its output layer and soft cap: "
                "this model family is not supported"
            )


def states_agree(states: Tensor, expected: Tensor) -> bool:
    """Whether states are the same, norm-wise, up to the rounding of their dtype."""
    rounding = 1e-4 if expected.dtype == torch.float32 else 0.02
    return bool((states - expected).float().norm() <= rounding * expected.float().norm())
