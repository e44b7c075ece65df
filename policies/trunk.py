"""One frozen base model that all roles share, with an adapter for each role."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from policies import probes
from policies.batching import length_buckets
from policies.errors import UserError
from policies.files.adapters import save_adapter
from policies.layers.attention import install_attention
from policies.layers.embedding_noise import lengths_by_token, noisy_embeddings
from policies.layers.packing import PackedSequences, PaddedBlock
from policies.layers.rms_norm import RmsNormForward
from policies.layers.rotary import install_rotary
from policies.layers.swiglu import SwigluForward
from policies.logits import LogitTransform
from policies.microbatches import default_microbatch_tokens, packed_multiple
from policies.schema import PolicySettings

UNUSED_MASK_SHAPE = (1, 1, 1, 1)
"""Models hand a mask of four dimensions to their attention unchanged; attention over packed sequences ignores it."""

AdapterWeights = dict[str, Tensor]
"""The tensors of a role's adapter, by name in its file; the names do not contain the role."""


class Trunk(nn.Module, ABC):
    """A causal language model whose frozen weights several roles share.

    Each role has an adapter: what `policy.method` trains, and no other role uses. A role without an adapter is the
    unchanged base model. The base's tensors exist once whatever the number of roles.

    Attributes:
        width: The hidden size H.
        roles: Roles that have an adapter.
        settings: The `policy` section of the experiment.
        base: Folder or hub name of the base model.
        causal: The base model with its LM head, as transformers and PEFT have it.
        supports_packing: Whether sequences can be computed without padding between them.
    """

    supports_continuous_batching = True
    """Whether sequences that were decoded separately may continue in one batch, padded on the left."""

    def __init__(self, base: PreTrainedModel, settings: PolicySettings, roles: tuple[str, ...]) -> None:
        """Put the adapters of all roles on a base model.

        Args:
            base: The model; it is changed in place.
            settings: The adaptation method and its settings.
            roles: The roles that get an adapter. It changes nothing at first; soft prompts are equal at first.

        Raises:
            UserError: The method finds nothing to train in this model, or the model computes its logits by more than
                its LM head and `LogitTransform`.
        """
        super().__init__()
        self.width: int = base.get_input_embeddings().weight.shape[1]
        self.roles = roles
        self.settings = settings
        self.base = base.config.name_or_path
        self._role = roles[0]
        self._recomputed: list[nn.Module] = []
        self._transform_logits = LogitTransform(base.config)
        self.causal = base
        _install_forwards(base)
        self._build(base)
        self.train_only()
        self.eval()
        if self.causal.device.type != "meta":  # the parameters of a model without weights are only counted
            probes.check_head(self)
        self.supports_packing = self._supports_packing()

    @abstractmethod
    def _build(self, base: PreTrainedModel) -> None:
        """Create the adapters of `self.roles`."""

    @abstractmethod
    def switch(self, role: str) -> None:
        """Use a role's adapter in the next forward passes, without copying any weight."""

    @abstractmethod
    def adapter(self, role: str) -> dict[str, nn.Parameter]:
        """The live parameters of a role's adapter by their name in its file."""

    def undecayed(self, role: str) -> set[str]:
        """The names in `adapter` of what weight decay spares: biases and the parameters of normalisation layers."""
        return {name for name in self.adapter(role) if "bias" in name.rpartition(".")[2]}

    def train_only(self, *roles: str) -> None:
        """Let gradients flow to the adapters of these roles and to no other parameter."""
        self.requires_grad_(False)
        for role in roles:
            for parameter in self.adapter(role).values():
                parameter.requires_grad_(True)

    def hidden(self, ids: Tensor, role: str) -> Tensor:
        """Last hidden states of padded sequences under a role's adapter.

        Args:
            ids: `[B, T]` int64. Sequences may be padded on the right: attention is causal, so no real position attends
                to padding.
            role: The role whose adapter is used; a role without one gets the base model's states.

        Returns:
            `[B, T, H]` in the base's dtype, meaningless where a sequence is padded.
        """
        self.switch(role)
        return self.states(input_ids=ids, use_cache=False)

    def hidden_packed(self, ids: Tensor, lengths: Sequence[int], role: str, noise: float = 0.0) -> Tensor:
        """Last hidden states of packed sequences under a role's adapter.

        Computed without padding where the model can (`supports_packing`).

        Args:
            ids: `[N]` int64, the tokens of all sequences, one sequence after another.
            lengths: B numbers, tokens of each sequence.
            role: The role whose adapter is used.
            noise: α of the noise that is added to the embeddings of tokens, see `noisy_embeddings` (NEFTune); 0: none.

        Returns:
            `[N, H]` in the base's dtype.
        """
        sizes = list(lengths)
        embeddings = self.causal.get_input_embeddings()
        if not self.supports_packing:
            block = PaddedBlock.of(sizes, ids.device)
            with noisy_embeddings(embeddings, lambda: torch.tensor(sizes, device=ids.device)[:, None], noise):
                return block.unpad(self.hidden(block.pad(ids), role))
        self.switch(role)
        filler = -len(ids) % packed_multiple(self.causal)
        if filler:
            sizes.append(filler)  # a further sequence, whose states are dropped
        packed = PackedSequences.of(sizes, ids.device)
        with noisy_embeddings(embeddings, lambda: lengths_by_token(packed.lengths, ids.device), noise):
            states = self.packed_states(nn.functional.pad(ids, (0, filler)), packed)  # [N + filler, H]
        return states[: len(ids)]

    def packed_states(self, ids: Tensor, packed: PackedSequences) -> Tensor:
        """Last hidden states `[N, H]` of packed sequences `[N]` under the adapter in use."""
        states = self.states(
            input_ids=ids[packed.order].unsqueeze(0),
            position_ids=packed.positions.unsqueeze(0),
            attention_mask=torch.ones(UNUSED_MASK_SHAPE, dtype=torch.bool, device=ids.device),
            use_cache=False,
            packed=packed,
        )  # [1, N, H], in order of length
        return states.squeeze(0).index_select(0, packed.inverse)

    def hidden_shared_prompts(self, ids: Tensor, positions: Tensor, attention_mask: Tensor, role: str) -> Tensor:
        """Last hidden states of a `SharedPromptBatch`; see `supports_shared_prompts`.

        Args:
            ids: `[B, T]` int64.
            positions: `[B, T]` int64.
            attention_mask: `[B, 1, T, T]` bool, True where a query attends to a key.
            role: The role whose adapter is used.

        Returns:
            `[B, T, H]` in the base's dtype, meaningless where a sequence is padded.
        """
        self.switch(role)
        return self.states(input_ids=ids, position_ids=positions, attention_mask=attention_mask, use_cache=False)

    def _supports_packing(self) -> bool:
        return probes.supports_packing(self)

    def supports_shared_prompts(self, role: str) -> bool:
        """Whether responses to one prompt can be computed with the prompt's states computed once."""
        return probes.supports_shared_prompts(self, role)

    def default_microbatch_tokens(self) -> int:
        """Tokens per microbatch that suit this device and the memory that is free on it."""
        return default_microbatch_tokens(self.causal, self.width)

    def microbatches(self, lengths: Sequence[int], tokens: int | None = None, padded: bool = False) -> list[list[int]]:
        """Split sequences into microbatches.

        Args:
            lengths: Tokens of each sequence.
            tokens: The most tokens per microbatch; None: `default_microbatch_tokens`.
            padded: Count padding even where the model `supports_packing`; where it does not, padding always counts.

        Returns:
            Indices of the sequences of each microbatch, see `length_buckets`.
        """
        return length_buckets(lengths, tokens or self.default_microbatch_tokens(), padded or not self.supports_packing)

    def states(self, **inputs: Any) -> Tensor:
        """Last hidden states `[B, T, H]` under the adapter in use; inputs are named as in transformers."""
        # transformers recomputes only in layers in training mode, and drops the cache there. So only these modules are
        # put in training mode, and only while gradients flow; the modules inside them are not, so dropout stays off.
        for layer in self._recomputed:
            layer.training = torch.is_grad_enabled()
        return self._model_of(self._role).base_model(**inputs).last_hidden_state

    def next_states(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Last hidden states of one new token per sequence, under the adapter in use.

        Args:
            ids: `[B]` int64, the new tokens.
            positions: `[B, 1]` int64, the positions of the new tokens in their sequences.
            mask: `[B, S]` int64, 1 where a token is attended to, the new ones last.
            cache: The KV cache; the new tokens are appended.

        Returns:
            `[B, H]` in the base's dtype.
        """
        inputs = {"input_ids": ids.unsqueeze(1), "attention_mask": mask, "position_ids": positions}
        return self.states(**inputs, past_key_values=cache, use_cache=True)[:, -1]

    def head(self, hidden: Tensor, role: str) -> Tensor:
        """Logits `[..., V]` of a role's hidden states `[..., H]`, in their dtype."""
        outputs = self._model_of(role).get_output_embeddings()(hidden)  # [..., V]
        return self._transform_logits(outputs)

    def _model_of(self, role: str) -> PreTrainedModel:
        return self.causal

    def read_adapter(self, role: str) -> AdapterWeights:
        """A copy of a role's adapter, by name in its file."""
        return {name: parameter.detach().clone() for name, parameter in self.adapter(role).items()}

    @torch.no_grad()
    def write_adapter(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Overwrite a role's adapter; a merged role is no longer merged.

        Args:
            role: The role whose adapter is overwritten.
            weights: All its tensors, by name in its file.

        Raises:
            UserError: Names or shapes differ from those of this trunk.
        """
        parameters = self.adapter(role)
        if parameters.keys() != weights.keys():
            different = sorted(parameters.keys() ^ weights.keys())
            raise UserError(
                "the adapter is made for another base or other targets: "
                f"{different[0]} and {len(different) - 1} more names differ"
            )
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                shapes = f"{tuple(weights[name].shape)}, here it is {tuple(parameter.shape)}"
                raise UserError(f"the adapter's {name} is {shapes}: another base, or other sizes in `policy`")
            parameter.copy_(weights[name])

    def save(self, role: str, folder: Path) -> None:
        """Write a role's adapter to a folder (see `save_adapter`)."""
        save_adapter(folder, self.read_adapter(role), self.settings, self.base)

    def merge(self, role: str) -> None:
        """Let a role's forward passes use a copy of the weights with its current adapter merged into them.

        They are faster then, and give no gradients. Nothing changes where the method has nothing to merge.
        """

    def initialise(self, *roles: str) -> None:
        """Initialise the adapters of roles as `policy.init` says; called for roles without a saved adapter."""

    def start_training(self, role: str) -> None:
        """Prepare to train a role from scratch in a supervised stage; called before `train_only`."""

    def encoder(self, role: str) -> nn.Module | None:
        """The module that is trained in place of a role's adapter, which it makes; None: the adapter itself is."""
        return None

    def step_state(self, role: str) -> nn.Module | None:
        """What the steps of a supervised stage change besides a role's adapter, for checkpoints; None: nothing."""
        return None

    def start_step(self, role: str, progress: float, seed: int) -> None:
        """Prepare for a step of a supervised stage.

        Args:
            role: The role that is trained.
            progress: The share of the stage's steps that are done after this one.
            seed: Seed of what the method draws in this step, the same on all ranks.
        """

    def take_route(self, role: str, number: int) -> None:
        """Make the next forward passes in training those of one of the method's `sft_passes` routes."""

    def before_step(self, role: str) -> None:
        """Called before each optimizer step at ZeRO stage 0, when a role's gradients are complete and not clipped."""

    def after_step(self, role: str) -> None:
        """Called after each optimizer step at ZeRO stage 0."""

    def merged_parameter_count(self) -> int:
        """The number of parameters of the copies that `merge` makes for one role."""
        return 0

    def merged_weights(self, role: str) -> dict[str, Tensor]:
        """The base's weights with a role's adapter merged into them. The trunk must not be used afterwards.

        Args:
            role: The role whose adapter is merged.

        Returns:
            The weights that change, or all weights, by name in the base; none of them is quantised.

        Raises:
            UserError: The method changes more than weights.
        """
        raise UserError(
            f"policy.method {self.settings.method} cannot be merged into the weights: export it as it is, "
            "for `policies.methods` to load"
        )

    def use_module_forwards(self) -> None:
        """Let every weight be used by the module that holds it, because the hooks of ZeRO 3 gather it there."""

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, where gradients flow: less memory, more time."""
        # The model's layers hold the function: a strong reference to this trunk would be a cycle.
        contexts = weakref.WeakMethod(self._recompute_contexts)

        def recompute_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            method = contexts()
            if method is None:
                raise RuntimeError("activations are recomputed after their trunk is gone")
            return method()

        self.causal.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recompute_contexts})
        self._recomputed = [m for m in self.causal.modules() if isinstance(m, GradientCheckpointingLayer)]

    def _recompute_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a layer's forward pass and of its recomputation, which must be under the same role."""
        return nullcontext(), self._acting_as(self._role)

    @contextmanager
    def _acting_as(self, role: str) -> Iterator[None]:
        previous = self._role
        self.switch(role)
        try:
            yield
        finally:
            self.switch(previous)


def _install_forwards(base: PreTrainedModel) -> None:
    """Replace the forward passes of the model's layers by those of `policies.layers` that compute the same."""
    install_attention(base)
    install_rotary(base)
    for replacement in (RmsNormForward, SwigluForward):
        for module in filter(replacement.fits, base.modules()):
            module.forward = replacement(module)
