"""One frozen base model and an adapter for each role."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from policies.adapters import lora_config, save_adapter
from policies.errors import UserError
from policies.lora import AdaptedLinear
from policies.norms import FrozenRmsNorm
from policies.schema import PolicySettings

CPU_TOKENS = 1024

AdapterWeights = dict[str, Tensor]
"""Adapter weights by their name in a PEFT file, which does not hold the role."""


class Trunk(nn.Module):
    """A causal language model whose frozen weights several roles share.

    Each role is a LoRA adapter on the same layers; a role without an adapter of its own is the base model as it is.
    The base's tensors exist once whatever the number of roles.
    """

    def __init__(self, base: PreTrainedModel, settings: PolicySettings, roles: tuple[str, ...]) -> None:
        """Roles: those that have an adapter. Every adapter starts as a no-op (B = 0).

        Raises UserError where `policy.targets` matches no layer.
        """
        super().__init__()
        self.width: int = base.get_input_embeddings().weight.shape[1]
        self.roles = roles
        self.settings, self.base = settings, base.config.name_or_path
        self._role = roles[0]
        self._recomputed: list[nn.Module] = []
        self._adapted: list[AdaptedLinear] = []
        self._softcap: float | None = getattr(base.config, "final_logit_softcapping", None)
        self._build(base)
        self.train_only()
        self.eval()
        if self.causal.device.type != "meta":  # a model without weights is only counted
            self._check_head()

    def _build(self, base: PreTrainedModel) -> None:
        config = lora_config(self.settings, self.base)
        try:
            self.model = get_peft_model(base, config, adapter_name=self.roles[0])
        except ValueError as error:
            raise UserError(f"policy.targets: {error}") from error
        for role in self.roles[1:]:
            self.model.add_adapter(role, config)
        self.causal: PreTrainedModel = self.model.get_base_model()
        self._layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        self._adapted = [AdaptedLinear(layer) for layer in self._layers if AdaptedLinear.fits(layer)]
        for adapted in self._adapted:
            adapted.layer.forward = adapted
        for norm in filter(FrozenRmsNorm.fits, base.modules()):
            norm.forward = FrozenRmsNorm(norm)

    def switch(self, role: str) -> None:
        """Make the next forward passes those of a role.

        Sets the layers' active adapter and leaves `requires_grad` alone: peft's own `set_adapter` would turn the
        other adapters' gradients off, which DeepSpeed does not expect.
        """
        self._role = role
        adapted = role in self.roles
        for layer in self._layers:
            layer._disable_adapters = not adapted
            if adapted:
                layer._active_adapter = [role]

    def train_only(self, *roles: str) -> None:
        """Let gradients flow to the adapters of these roles and to nothing else."""
        self.requires_grad_(False)
        for role in roles:
            for parameter in self.adapter(role).values():
                parameter.requires_grad_(True)

    def hidden(self, ids: Tensor, role: str) -> Tensor:
        """Last hidden states `[B, T, H]` of right-padded rows `[B, T]` under a role's adapter."""
        self.switch(role)
        return self.states(input_ids=ids, use_cache=False)

    def states(self, **inputs: Any) -> Tensor:
        """Last hidden states of what the base model is given, under the adapter in use."""
        # transformers recomputes only in layers in training mode, and drops the cache there: only these modules
        # are put in it, nothing below them, so that dropout stays off, and only while gradients flow.
        for layer in self._recomputed:
            layer.training = torch.is_grad_enabled()
        return self._model_of(self._role).base_model(**inputs).last_hidden_state

    def head(self, hidden: Tensor, role: str) -> Tensor:
        """Logits `[..., V]` of a role's hidden states `[..., H]`."""
        logits = self._model_of(role).get_output_embeddings()(hidden)
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def _model_of(self, role: str) -> PreTrainedModel:
        return self.causal

    def adapter(self, role: str) -> dict[str, nn.Parameter]:
        """The live parameters of a role's adapter by their name in a PEFT file."""
        marked = f".{role}."
        return {n.replace(marked, "."): p for n, p in self.model.named_parameters() if marked in n}

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
                raise UserError(f"the adapter's {name} is {shapes}: another base, or another policy.rank")
            parameter.copy_(weights[name])
        for adapted in self._adapted:
            adapted.merged.pop(role, None)

    def tokens_a_pass(self) -> int:
        """How many tokens, padding counted, a forward and backward pass should have on this device.

        On a CPU so few that activations stay in its caches. On a GPU as many as a third of the free memory holds, by
        34 numbers a token and unit of width in each layer (Korthikanti et al. 2022, section 4.1), a power of two.
        """
        if self.causal.device.type != "cuda":
            return CPU_TOKENS
        free, _ = torch.cuda.mem_get_info(self.causal.device)
        config = self.causal.config
        numbers = 34 * config.num_hidden_layers * self.width + 3 * config.vocab_size
        return max(CPU_TOKENS, 2 ** int(math.log2(free / 3 / (numbers * self.causal.dtype.itemsize))))

    def save(self, role: str, folder: Path) -> None:
        """Write what is trained of a role (see `save_adapter`)."""
        save_adapter(folder, self.read_adapter(role), self.settings, self.base)

    def merge(self, role: str) -> None:
        """From now on, a role's passes use weights with its adapter, as it now is, in them: faster, and no gradient.

        It costs the memory of the adapted weights once more. Layers that LoRA does not adapt plainly stay as they are.
        """
        for adapted in self._adapted:
            adapted.merge(role)

    def leave_to_peft(self) -> None:
        """Use PEFT's own forward passes, which call the layers' parts as modules: sharding by ZeRO 3 hooks on these."""
        for adapted in self._adapted:
            del adapted.layer.forward
        self._adapted = []

    def checkpoint_gradients(self) -> None:
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
