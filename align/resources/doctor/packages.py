"""Checks Python and the installed packages against what align's own metadata requires."""

import platform
from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

from align.resources.doctor.finding import Finding, ok, problem
from policies.errors import first_line

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "align-rlhf"
"""The name under which align is installed. Its metadata has the versions that it is tested with."""
DEVELOPMENT = "dev"
"""The extra that runs never need."""
MODULES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "deepspeed",
    "ray",
    "wandb",
    "rollouts.transformers_engine",
    "align.learner.rank",
)
"""What runs import, in an order in which the first that fails is the cause."""


def check_python() -> Finding:
    """Whether this Python is one that align is tested with."""
    from packaging.specifiers import SpecifierSet

    required = metadata.metadata(DISTRIBUTION)["Requires-Python"]
    version = platform.python_version()
    if SpecifierSet(required).contains(version, prereleases=True):
        return ok(version)
    return problem(f"{version}, tested: {required}", f"install align in an environment of a Python {required}")


def check_packages() -> Finding:
    """Whether the packages that every run needs are there, in versions that align is tested with."""
    required = list(_required())
    faults = _faults(required)
    if faults:
        return problem("; ".join(faults.values()), _install(faults))
    return ok(", ".join(f"{requirement.name} {_installed(requirement)}" for requirement in required))


def check_optional_packages() -> Finding:
    """Whether the packages of extras, where they are installed, have versions that align is tested with."""
    installed = []
    missing = []
    for extra, requirement in _optional():
        if _installed(requirement):
            installed.append(requirement)
        else:
            missing.append(f"{requirement.name} (pip install '{DISTRIBUTION}[{extra}]')")
    faults = _faults(installed)
    if faults:
        return problem("; ".join(faults.values()), _install(faults))
    words = [f"{requirement.name} {_installed(requirement)}" for requirement in installed]
    if missing:
        words.append(f"not installed, and only some settings need them: {', '.join(missing)}")
    return ok("; ".join(words))


def check_imports() -> Finding:
    """Whether the libraries of a run can be imported, and with them what generates and learns."""
    for module in MODULES:
        try:
            import_module(module)
        except Exception as error:
            return problem(_import_fault(module, error), _reinstall(module, error))
    return ok(", ".join(MODULES))


def check_vllm() -> Finding:
    """Whether vLLM, where it is installed, can be imported."""
    if find_spec("vllm") is None:
        return ok("not installed; only `rollouts.engine: vllm` needs it")
    try:
        vllm = import_module("vllm")
    except Exception as error:
        return problem(_import_fault("vllm", error), _reinstall("vllm", error))
    return ok(vllm.__version__)


def versions() -> dict[str, str]:
    """The versions of Python, of align and of each package that every run needs; empty for one that is missing."""
    found = {"Python": platform.python_version(), DISTRIBUTION: metadata.version(DISTRIBUTION)}
    for requirement in _required():
        found[requirement.name] = _installed(requirement)
    return found


def _requirements() -> Iterator["Requirement"]:
    from packaging.requirements import Requirement

    for text in metadata.requires(DISTRIBUTION) or []:
        yield Requirement(text)


def _required() -> Iterator["Requirement"]:
    """The packages that every run needs."""
    for requirement in _requirements():
        if _applies(requirement, ""):
            yield requirement


def _optional() -> Iterator[tuple[str, "Requirement"]]:
    """The packages of each extra that a run may need."""
    extras = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    for requirement in _requirements():
        for extra in extras:
            if extra != DEVELOPMENT and not _applies(requirement, "") and _applies(requirement, extra):
                yield extra, requirement


def _applies(requirement: "Requirement", extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _installed(requirement: "Requirement") -> str:
    """The installed version; empty where there is none."""
    try:
        return metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return ""


def _faults(requirements: Sequence["Requirement"]) -> dict[str, str]:
    """What is wrong with a package, by what pip takes to install it."""
    faults = {}
    for requirement in requirements:
        version = _installed(requirement)
        if not version:
            faults[_for_pip(requirement)] = f"{requirement.name} is not installed"
        elif not requirement.specifier.contains(version, prereleases=True):
            faults[_for_pip(requirement)] = f"{requirement.name} is {version}, tested: {requirement.specifier}"
    return faults


def _for_pip(requirement: "Requirement") -> str:
    """A requirement without its marker."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _install(packages: Sequence[str] | dict[str, str], options: str = "") -> str:
    return f"pip install {options}" + " ".join(f"'{package}'" for package in packages)


def _import_fault(module: str, error: Exception) -> str:
    return f"{module} cannot be imported: {type(error).__name__}: {first_line(error)}"


def _reinstall(module: str, error: Exception) -> str:
    """What mends a module that cannot be imported."""
    if "torchvision" in str(error):
        return "pip uninstall torchvision (it is built for another torch, and align does not need it)"
    for requirement in _requirements():
        is_installed_vllm = module == "vllm" and requirement.name.startswith("vllm") and _installed(requirement)
        if requirement.name == module or is_installed_vllm:
            return _install([_for_pip(requirement)], options="--force-reinstall ")
    return "`pip check` names the packages that do not fit together: install the versions that it asks for"
