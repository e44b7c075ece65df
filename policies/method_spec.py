"""What an adaptation method is, and the registry that finds all of them.

A method is one file in `policies/methods` that assigns a `MethodSpec` to `SPEC`; the file has the method's name.
Validation, files, export, the memory plan and the tables in docs/methods.md ask the spec for all that depends on the
method, so that a new method needs no change anywhere else.
"""

import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from policies.schema import PolicySettings

PACKAGE = "policies.methods"
ASSIGNS_SPEC = re.compile(r"^SPEC\b", re.MULTILINE)


@dataclass(frozen=True)
class Support:
    """Whether a method works with an option, and under which condition.

    Attributes:
        supported: whether it does at all.
        without: names of settings of `policy` that must keep their defaults for it.
    """

    supported: bool
    without: tuple[str, ...] = ()

    def allows(self, policy: "PolicySettings") -> bool:
        """Whether a policy of the method works with the option as it is set."""
        return self.supported and all(policy.is_default(name) for name in self.without)

    @property
    def condition(self) -> str:
        """The condition in words, such as "without dora and init"; empty where there is none."""
        return f"without {' and '.join(self.without)}" if self.without else ""


YES = Support(True)
NO = Support(False)


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """One adaptation method: where its code is, what it reads and writes, and what it works with.

    Attributes:
        name: what `policy.method` says; also the name of the file.
        trains: what each role has of its own, in a few words.
        source: the papers, as "Author year", separated by semicolons.
        trunk: its trunk as "module:Class", imported when a trunk is built, so that validation needs no torch.
        reads: the settings of `policy` that it reads besides `method`.
        peft_type: what `adapter_config.json` calls it; empty where a role is saved as a complete model.
        peft_config: "module:function" that makes PEFT's config of a saved adapter from the settings, the base's name
            and the adapter's weights; empty where PEFT does not have the method.
        saved_settings: names of settings that a saved adapter must agree with, and their names in its file.
        prompt_kind: what its virtual tokens are; None where it trains no soft prompt.
        shares_base: whether the roles share one frozen base; otherwise each is a complete model.
        four_bits: whether the base's linear layers are quantised to four bits.
        below_float32: whether `model.dtype` may be coarser than float32.
        merges_for_sampling: whether `rollouts.merge` makes a copy of the weights with the adapter in it.
        merges_at_export: whether `export --merge` can write it into the base's weights.
        vllm: whether vLLM can swap its adapters.
        zero3: whether ZeRO stage 3 can shard its trunk.
        checkpointing_conflict: why `model.gradient_checkpointing` does not work with it, and what to use instead; empty
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
    vllm: Support = NO
    zero3: Support = NO
    checkpointing_conflict: str = ""

    @property
    def in_peft(self) -> bool:
        """Whether PEFT itself has the method, and loads its adapters."""
        return bool(self.peft_config)

    def load_trunk(self) -> Any:
        """Import the class of the trunk."""
        return pkgutil.resolve_name(self.trunk)

    def load_peft_config(self) -> Any:
        """Import the function that makes PEFT's config."""
        return pkgutil.resolve_name(self.peft_config)


@cache
def methods() -> Mapping[str, MethodSpec]:
    """All methods by name, in alphabetical order. Raises ValueError where a method is not named as its file."""
    folder = Path(str(import_module(PACKAGE).__path__[0]))
    registry: dict[str, MethodSpec] = {}
    for path in sorted(folder.glob("*.py")):
        if not ASSIGNS_SPEC.search(path.read_text(encoding="utf-8")):
            continue  # a trunk's module; it imports torch, which validation of settings must not
        spec: MethodSpec = import_module(f"{PACKAGE}.{path.stem}").SPEC
        if spec.name != path.stem:
            raise ValueError(f"{path}: SPEC.name is {spec.name!r}, but must be the name of the file, {path.stem!r}")
        registry[spec.name] = spec
    return MappingProxyType(registry)


def supporting(option: str) -> str:
    """The methods that work with an option, each with its condition: "bottleneck, full or lora without dora and init".

    Args:
        option: a field of `MethodSpec` that is a `Support`.
    """
    names: list[str] = []
    for spec in methods().values():
        support: Support = getattr(spec, option)
        if support.supported:
            names.append(f"{spec.name} {support.condition}".strip())
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
