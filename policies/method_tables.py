"""The tables of docs/methods.md, from the registry of methods.

python -m policies.method_tables
"""

from policies.method_spec import MethodSpec, Support, methods
from policies.schema import PolicySettings

DEFAULT_METHOD: str = PolicySettings.model_fields["method"].default

METHODS_HEADER = ("method", "trained for each role", "settings of `policy`", "source")
COMPATIBILITY_HEADER = (
    "method",
    "shares the base",
    "`rollouts.engine: vllm`",
    "`rollouts.merge`",
    "`export --merge`",
    "`--scale`",
    "ZeRO 3",
    "`model.dtype` below float32",
    "`model.gradient_checkpointing`",
    "layout",
)


def methods_table() -> str:
    """What each method trains, the settings that it reads and its papers, as Markdown."""
    table: list[tuple[str, ...]] = [METHODS_HEADER]
    for spec in ordered_methods():
        name = f"`{spec.name}` (default)" if spec.name == DEFAULT_METHOD else f"`{spec.name}`"
        settings = ", ".join(f"`{setting}`" for setting in spec.reads)
        table.append((name, spec.trains, settings, spec.source))
    return markdown(table)


def compatibility_table() -> str:
    """What each method works with, as Markdown."""
    table: list[tuple[str, ...]] = [COMPATIBILITY_HEADER]
    for spec in ordered_methods():
        table.append(
            (
                f"`{spec.name}`",
                yes_or_no(spec.shares_base),
                support_in_words(spec.vllm),
                support_in_words(spec.merges_for_sampling),
                yes_or_no(spec.merges_at_export),
                support_in_words(spec.scales),
                support_in_words(spec.zero3),
                yes_or_no(spec.below_float32),
                yes_or_no(not spec.checkpointing_conflict),
                layout(spec),
            )
        )
    return markdown(table)


def ordered_methods() -> list[MethodSpec]:
    """The default first, then by kind: adapters, parameters of the base, soft prompts, complete models."""

    def sort_key(spec: MethodSpec) -> tuple[bool, bool, bool, bool, str]:
        is_soft_prompt = spec.prompt_kind is not None
        return (spec.name != DEFAULT_METHOD, not spec.shares_base, is_soft_prompt, not spec.below_float32, spec.name)

    return sorted(methods().values(), key=sort_key)


def layout(spec: MethodSpec) -> str:
    """The library that loads the folder of a saved role."""
    if spec.in_peft:
        return "PEFT"
    return "`policies`" if spec.shares_base else "transformers"


def support_in_words(support: Support) -> str:
    """Whether a method supports an option: `no`, `yes`, or `yes, without dora`."""
    if not support.supported:
        return "no"
    return f"yes, {support.condition}" if support.condition else "yes"


def yes_or_no(value: bool) -> str:
    """A truth value in words."""
    return "yes" if value else "no"


def markdown(table: list[tuple[str, ...]]) -> str:
    """A table in Markdown, its header first, without a final line break."""
    header, *body = table
    lines = [line_of(header), "|---" * len(header) + "|"]
    lines += [line_of(cells) for cells in body]
    return "\n".join(lines)


def line_of(cells: tuple[str, ...]) -> str:
    """One line of a table; an empty cell is a single space."""
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


if __name__ == "__main__":
    print(methods_table(), compatibility_table(), sep="\n\n")
