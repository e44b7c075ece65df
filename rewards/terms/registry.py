"""The kinds of term: every settings class with a `kind` that a module of `rewards.terms` defines."""

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, Annotated, Union, get_args

from pydantic import Field

import rewards.terms as package
from rewards.terms.base import TermSettings


def _find_terms() -> dict[str, type[TermSettings]]:
    terms: dict[str, type[TermSettings]] = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        if info.name == __name__.rpartition(".")[2]:
            continue
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for value in vars(module).values():
            if _is_term(value) and value.__module__ == module.__name__:
                kind = _kind_of(value)
                if kind in terms:
                    raise ValueError(f"{module.__name__} defines kind {kind!r}, and so does {terms[kind].__module__}")
                terms[kind] = value
    return terms


def _is_term(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, TermSettings) and "kind" in value.model_fields


def _kind_of(term: type[TermSettings]) -> str:
    (kind,) = get_args(term.model_fields["kind"].annotation)
    return str(kind)


TERMS = _find_terms()
"""The settings classes by their `kind`."""

if TYPE_CHECKING:
    Term = TermSettings
else:
    Term = Annotated[Union[tuple(TERMS.values())], Field(discriminator="kind")]  # noqa: UP007  # a runtime union
"""Any of the settings classes, chosen by `kind`."""


def terms_table() -> str:
    """The table of terms in Markdown, as `docs/rewards.md` has it: each kind and what its score is."""
    lines = ["| `kind` | score |", "|---|---|"]
    for kind, term in TERMS.items():
        summary = inspect.cleandoc(term.__doc__ or "").split("\n\n")[0].replace("\n", " ").removesuffix(".")
        lines.append(f"| `{kind}` | {summary} |")
    return "\n".join(lines)
