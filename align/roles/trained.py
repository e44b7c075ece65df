"""What a learner trains: adapters on shared base models and the modules on top of them, in parameter groups."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from policies.layers.lora import rate_factor
from policies.module_names import undecayed_names
from policies.trunk import Trunk


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the optimizer treats alike.

    Attributes:
        name: ROLE or ROLE.PART. The gradient of a role is clipped by its norm over all parts.
        parameters: The parameters.
        factor: Multiplier of the role's learning rate.
        options: Hyperparameters of the optimizer, where they are not those of the settings.
    """

    name: str
    parameters: list[nn.Parameter]
    factor: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


def role_of_group(name: str) -> str:
    """The role of a parameter group, which is named ROLE or ROLE.PART."""
    return name.partition(".")[0]


class TrainedModule(nn.Module, ABC):
    """All modules of a learner, in one module for DeepSpeed to wrap.

    `forward` calls a function with this module, so that everything that reads weights runs under DeepSpeed's hooks,
    which gather sharded parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self._named_parameters: dict[tuple[Any, ...], list[tuple[str, nn.Parameter]]] = {}

    @property
    @abstractmethod
    def trunks(self) -> list[Trunk]:
        """The base models, the shared one first."""

    @property
    @abstractmethod
    def trained_adapters(self) -> dict[str, Trunk]:
        """The roles whose adapters are trained, with the trunk of each."""

    @property
    @abstractmethod
    def trained_heads(self) -> dict[str, nn.Module]:
        """The other trained modules by name: ROLE or ROLE.PART."""

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function with this module and the other arguments."""
        return function(self, *arguments)

    def named_parameters(self, *options: Any, **named: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As `nn.Module.named_parameters`, but cached: DeepSpeed calls it several times per step."""
        key = options, *sorted(named.items())
        if key not in self._named_parameters:
            self._named_parameters[key] = list(super().named_parameters(*options, **named))
        return iter(self._named_parameters[key])

    def microbatches(self, lengths: Sequence[int], tokens: int | None = None) -> list[list[int]]:
        """Group sequences into microbatches for the forward passes of every role.

        Args:
            lengths: Tokens of each sequence.
            tokens: Largest number of tokens per microbatch, padding included; None: chosen for the device.

        Returns:
            The indices of the sequences of each microbatch.
        """
        is_padded = not all(trunk.supports_packing for trunk in self.trunks)
        return self.trunks[0].microbatches(lengths, tokens, padded=is_padded)

    def default_microbatch_tokens(self) -> int:
        """Tokens per microbatch that suit the device and the memory that is free on it."""
        return self.trunks[0].default_microbatch_tokens()

    def before_step(self, *_: Any) -> None:
        """A hook before the optimizer's step: what the methods of the trained adapters do then."""
        for role, trunk in self.trained_adapters.items():
            trunk.before_step(role)

    def after_step(self, *_: Any) -> None:
        """A hook after the optimizer's step."""
        for role, trunk in self.trained_adapters.items():
            trunk.after_step(role)

    def groups(self) -> list[ParameterGroup]:
        """The parameter groups of the optimizer: of each role, by learning rate (LoRA+) and weight decay.

        Biases and the weights of normalisation layers do not decay.
        """
        groups: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
        for role, trunk in self.trained_adapters.items():
            undecayed = trunk.undecayed(role)
            for name, parameter in trunk.adapter(role).items():
                key = (role, rate_factor(name, trunk.settings.lora_plus), name not in undecayed)
                groups.setdefault(key, []).append(parameter)
        for role, head in self.trained_heads.items():
            undecayed = undecayed_names(head)
            for name, parameter in head.named_parameters():
                if parameter.numel():
                    groups.setdefault((role, 1.0, name not in undecayed), []).append(parameter)
        return [_make_group(*key, parameters) for key, parameters in groups.items()]


def _make_group(role: str, factor: float, decays: bool, parameters: list[nn.Parameter]) -> ParameterGroup:
    name = role if factor == 1.0 else f"{role}.up"
    if decays:
        return ParameterGroup(name, parameters, factor)
    return ParameterGroup(f"{name}.undecayed", parameters, factor, {"weight_decay": 0.0})
