"""The trunk of AdaMix: bottleneck adapters, of which each layer has several in SFT."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from policies.layers.mixture import Mixture
from policies.methods.bottleneck_trunk import BottleneckTrunk


class AdaMixTrunk(BottleneckTrunk):
    """A trunk with bottleneck adapters, and mixtures of them for roles that are trained from scratch."""

    def _build(self, base: PreTrainedModel) -> None:
        super()._build(base)
        self._mixtures: dict[str, list[Mixture]] = {}
        self._routes: list[list[int]] = []  # for each route the expert of each mixture
        self._route = 0

    def start_training(self, role: str) -> None:
        """Put mixtures in the place of the role's adapters; one of the experts is the adapter itself."""
        mixtures: list[Mixture] = []
        for layer in self._layers:
            down = Mixture(self._experts(layer.bottleneck_down[role], fresh=True))
            up = Mixture(self._experts(layer.bottleneck_up[role], fresh=False))
            layer.bottleneck_down[role] = down
            layer.bottleneck_up[role] = up
            mixtures += [down, up]
        self._mixtures[role] = mixtures

    def _experts(self, first: nn.Linear, fresh: bool) -> list[nn.Linear]:
        """The experts of a projection; fresh: each with its own initial weights, otherwise with those of the first."""
        experts = [first]
        for _ in range(1, self.settings.experts):
            expert = nn.Linear(first.in_features, first.out_features, device=first.weight.device)
            if not fresh:
                expert.load_state_dict(first.state_dict())
            experts.append(expert)
        return experts

    def encoder(self, role: str) -> nn.Module | None:
        """The mixtures, whose average is the adapter."""
        return nn.ModuleList(self._mixtures[role]) if role in self._mixtures else None

    def read_adapter(self, role: str) -> dict[str, Tensor]:
        weights = super().read_adapter(role)
        if role not in self._mixtures:
            return weights
        return {name: experts.mean(0) for name, experts in weights.items()}  # [experts, ...] -> [...]

    def write_adapter(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Overwrite a role's adapter, and discard its mixtures, whose average would be another."""
        if role in self._mixtures:
            del self._mixtures[role]
            for layer in self._layers:
                for projections in (layer.bottleneck_down, layer.bottleneck_up):
                    _, outputs, inputs = projections[role].weight.shape
                    projections[role] = nn.Linear(inputs, outputs, device=projections[role].weight.device)
        super().write_adapter(role, weights)

    def start_step(self, role: str, progress: float, seed: int) -> None:
        """Draw the routes of a step, the same for all its microbatches and on all ranks."""
        if role in self._mixtures:
            generator = torch.Generator(device="cpu").manual_seed(seed)
            shape = (self.settings.spec.sft_passes, len(self._mixtures[role]))
            self._routes = torch.randint(self.settings.experts, shape, generator=generator, device="cpu").tolist()

    def take_route(self, role: str, number: int) -> None:
        if role in self._mixtures:
            self._route = number
            for mixture, expert in zip(self._mixtures[role], self._routes[number], strict=True):
                mixture.expert = expert

    def _recompute_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._acting_on_route(self._role, self._route)

    @contextmanager
    def _acting_on_route(self, role: str, route: int) -> Iterator[None]:
        previous = self._route
        self.take_route(role, route)
        try:
            with self._acting_as(role):
                yield
        finally:
            self.take_route(role, previous)
