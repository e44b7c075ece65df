"""What an adaptation method is, and the registry that finds all of them.

A method is one file in `policies/methods` that assigns a `MethodSpec` to `SPEC`; the file has the method's name. Its
trunk is in a file whose name ends in `_trunk`. Validation, saving, export, the memory plan and the tables of
docs/methods.md read the spec for all that depends on the method, so that a new one needs no change anywhere else.
"""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from policies.schema import PolicySettings

PACKAGE = "policies.methods"
TRUNK_SUFFIX = "_trunk"
"""Modules whose names end in it are no methods. They import torch, which the validation of settings must not."""


@dataclass(frozen=True)
class Support:
    """Whether a method works with an option, and under which condition.

    Attributes:
        supported: Whether it does at all.
        without: Settings of `policy` that must keep their defaults for it.
    """

    supported: bool
    without: tuple[str, ...] = ()

    def allows(self, policy: "PolicySettings") -> bool:
        """Whether the option works with these settings of the method."""
        return self.supported and all(policy.is_default(name) for name in self.without)

    @property
    def condition(self) -> str:
        """The condition in words, such as "without dora and init"; empty where there is none."""
        return f"without {' and '.join(self.without)}" if self.without else ""


YES = Support(True)
NO = Support(False)


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """One adaptation method: what it trains, where its code is, and what it works with.

    Attributes:
        name: Value of `policy.method`; also the name of the file.
        trains: What is trained for each role, in a few words.
        trunk: Its trunk as "module:Class"; imported only when a trunk is built, so that validation needs no torch.
        source: The papers, as "Author year", separated by semicolons.
        reads: The settings of `policy` that it reads besides `method`.
        peft_type: Its `peft_type` in `adapter_config.json`; empty where a role is saved as a complete model.
        peft_config: "module:function" that makes PEFT's config of a saved adapter from the settings, the base's name
            and the adapter's weights; empty where PEFT does not have the method.
        saved_settings: Settings that a saved adapter must agree with, and their names in `adapter_config.json`.
        prompt_kind: What its virtual tokens are; None for a method without a soft prompt.
        shares_base: Whether the roles share one frozen base; otherwise each is a complete model.
        four_bits: Whether the base's linear layers are quantised to four bits.
        below_float32: Whether `model.dtype` may be of lower precision than float32.
        merges_for_sampling: Whether `rollouts.merge` can decode with a copy of the weights that contains the adapter.
        merges_at_export: Whether `export --merge` can write the adapter into the base's weights.
        scales: Whether `--scale` can move the policy along its line through the reference: the model's weights depend
            linearly on the adapter's parameters, or on the product of its low-rank matrices.
        is_low_rank: Whether the adapter is LoRA's matrices A and B.
        vllm: Whether vLLM can swap its adapters.
        zero3: Whether ZeRO stage 3 can shard its trunk.
        sft_passes: Forward passes of each microbatch in SFT; the predictions of two are drawn together.
        needs_sft: What it does in SFT, without which it cannot start; empty where it can.
        last_weights_only: Why the weights of an earlier step of SFT cannot be kept; empty where they can.
        zero_conflict: Why ZeRO stages 1 to 3 do not work with it, and what to use instead; empty where they do.
        checkpointing_conflict: Why `model.gradient_checkpointing` does not work with it, and what to use instead; empty
            where it does.
    """

    name: str
    trains: str
    trunk: str
    source: str = ""
    reads: tuple[str, ...] = ()
    peft_type: str = ""
    peft_config: str = ""
    saved_settings: Mapping[str, str] = field(default_factory=dict)
    prompt_kind: Literal["embeddings", "keys and values"] | None = None
    shares_base: bool = True
    four_bits: bool = False
    below_float32: bool = False
    merges_for_sampling: Support = NO
    merges_at_export: bool = False
    scales: Support = NO
    is_low_rank: bool = False
    vllm: Support = NO
    zero3: Support = NO
    sft_passes: Literal[1, 2] = 1
    needs_sft: str = ""
    last_weights_only: str = ""
    zero_conflict: str = ""
    checkpointing_conflict: str = ""

    @property
    def in_peft(self) -> bool:
        """Whether PEFT itself has the method, and loads its adapters."""
        return bool(self.peft_config)

    def load_trunk(self) -> Any:
        """Import the trunk's class, a subclass of `policies.trunk.Trunk`."""
        return pkgutil.resolve_name(self.trunk)

    def load_peft_config(self) -> Any:
        """Import the function that `peft_config` names."""
        return pkgutil.resolve_name(self.peft_config)


@cache
def methods() -> Mapping[str, MethodSpec]:
    """All methods by name, in alphabetical order.

    Raises:
        ValueError: A module has no `SPEC`, or is not named as its method.
    """
    registry: dict[str, MethodSpec] = {}
    package = import_module(PACKAGE)
    for name in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        if name.endswith(TRUNK_SUFFIX):
            continue
        module = import_module(f"{PACKAGE}.{name}")
        spec = getattr(module, "SPEC", None)
        if not isinstance(spec, MethodSpec):
            raise ValueError(
                f"{module.__file__} does not assign a MethodSpec to SPEC, as the file of a method must; the name of a "
                f"trunk's file ends in {TRUNK_SUFFIX}"
            )
        if spec.name != name:
            raise ValueError(f"{module.__file__}: SPEC.name is {spec.name!r}, but must be {name!r}, the file's name")
        registry[name] = spec
    return MappingProxyType(registry)


def supporting(option: str) -> str:
    """The methods that work with an option, each with its condition: "full or lora without dora and init".

    Args:
        option: Name of a field of `MethodSpec` that is a `Support`.
    """
    names: list[str] = []
    for spec in methods().values():
        support: Support = getattr(spec, option)
        if support.supported:
            names.append(f"{spec.name} {support.condition}".strip())
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
