"""The trunk of AdaLoRA: PEFT's layers, and the allocation of their ranks in SFT."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from peft import AdaLoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from policies.files.adapters import adapted_modules
from policies.layers.rank_allocation import RankAllocator, Triplets, budget, orthogonality
from policies.methods.linear_adapter_trunk import LinearAdapterTrunk
from policies.schema import PolicySettings


class AdaLoraTrunk(LinearAdapterTrunk):
    """A trunk with alpha / initial rank · P Λ Q beside linear layers."""

    adapts_conv1d = True

    def _build(self, base: PreTrainedModel) -> None:
        super()._build(base)
        self._allocators: dict[str, RankAllocator] = {}
        self._progress: dict[str, float] = {}
        self._is_pruned: dict[str, list[Tensor]] = {}

    def _wrap(self, base: PreTrainedModel) -> Iterable[BaseTunerLayer]:
        for layer in super()._wrap(base):
            constants = {role: layer.ranknum[role].detach() for role in self.roles}
            del layer.ranknum  # PEFT has these constants as parameters, which nothing trains or saves
            layer.ranknum = constants
            yield layer

    def start_training(self, role: str) -> None:
        """Distribute the role's ranks in the steps that follow."""
        self._allocators[role] = RankAllocator(self._triplets(role))

    def step_state(self, role: str) -> nn.Module | None:
        return self._allocators.get(role)

    def start_step(self, role: str, progress: float, seed: int) -> None:
        self._progress[role] = progress

    def before_step(self, role: str) -> None:
        """Add the gradient of the penalty on P and Q that are not orthogonal, and observe the gradient."""
        layers = self._triplets(role)
        self._add_penalty(layers)
        if role not in self._allocators:
            self._is_pruned[role] = _pruned(layers)
        elif self._progress[role] < self.settings.allocation_end:
            self._allocators[role].observe()

    @torch.no_grad()
    def after_step(self, role: str) -> None:
        """Keep the triplets that the budget of this step allows; in later stages those that SFT has kept."""
        if role not in self._allocators:
            for layer, is_pruned in zip(self._triplets(role), self._is_pruned[role], strict=True):
                layer.values.masked_fill_(is_pruned, 0.0)
            return
        allocator = self._allocators[role]
        count = budget(
            progress=self._progress[role],
            start=self.settings.allocation_start,
            end=self.settings.allocation_end,
            initial=allocator.initial,
            target=self.settings.rank * len(allocator.layers),
        )
        if count < allocator.initial:
            allocator.keep(count)

    def _add_penalty(self, layers: Sequence[Triplets]) -> None:
        trained: list[nn.Parameter] = []
        for layer in layers:
            trained += [layer.left, layer.right]
        penalty = self.settings.orthogonality * orthogonality(layers)
        for tensor, gradient in zip(trained, torch.autograd.grad(penalty, trained), strict=True):
            if tensor.grad is not None:
                tensor.grad.add_(gradient)

    def _triplets(self, role: str) -> list[Triplets]:
        """The trained tensors of a role, layer by layer."""
        layers: list[Triplets] = []
        for layer in self._layers:
            layers.append(Triplets(layer.lora_B[role], layer.lora_E[role], layer.lora_A[role]))
        return layers

    @staticmethod
    def _describe(settings: PolicySettings, targets: Sequence[str], base: str) -> AdaLoraConfig:
        return AdaLoraConfig(
            init_r=settings.full_initial_rank,
            target_r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            orth_reg_weight=settings.orthogonality,
            total_step=1,  # PEFT's own allocation, which is not used, wants a number
            inference_mode=True,  # PEFT allows one trainable adapter; `Trunk.train_only` says which are trained
            target_modules=list(targets),
            base_model_name_or_path=base,
            task_type="CAUSAL_LM",
        )


def saved_adalora_config(settings: PolicySettings, base: str, weights: Mapping[str, Tensor]) -> AdaLoraConfig:
    """PEFT's description of a saved adapter, whose weights say which layers it adapts."""
    return AdaLoraTrunk._describe(settings, adapted_modules(weights), base)


def _pruned(layers: Sequence[Triplets]) -> list[Tensor]:
    """Which singular values `[rank, 1]` of each layer SFT has pruned: those at zero; none where all are, at first."""
    pruned = [layer.values == 0 for layer in layers]
    if all(bool(is_pruned.all()) for is_pruned in pruned):
        return [torch.zeros_like(is_pruned) for is_pruned in pruned]
    return pruned
