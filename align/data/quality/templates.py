"""Instruction templates: each row's prompt is put into one of them."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import yaml

from align.config.schema import columns_in
from align.data.quality.rows import CheckedRow
from align.runtime.seeds import seed_for
from policies.errors import UserError
from policies.text.columns import Values


def read_templates(file: Path) -> list[str]:
    """Read a YAML list of texts with columns in braces, `{prompt}` among them. Raises UserError for anything else."""
    try:
        listed = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--template {file} cannot be read: {error}") from None
    if not isinstance(listed, list) or not listed:
        raise UserError(f"--template {file}: a YAML list of texts was expected")
    for number, template in enumerate(listed, start=1):
        try:
            is_valid = isinstance(template, str) and "prompt" in columns_in(template)
        except ValueError as error:
            raise UserError(f"--template {file}: number {number}: {error}") from None
        if not is_valid:
            raise UserError(f"--template {file}: number {number} is not a text with {{prompt}}")
    return listed


def rendered(row: CheckedRow, templates: Sequence[str], seed: int, number: int) -> dict[str, Any]:
    """The columns of a row with its prompt in a template.

    Args:
        row: With a prompt: text, or messages, of which the last one's text is put into the template.
        templates: One of them is drawn.
        seed: Of the draw, together with the row's number.
        number: The row's number.

    Raises:
        UserError: The row has no prompt, or lacks a column that the template names.
    """
    template = Random(seed_for(seed, "template", number)).choice(templates)
    prompt = row.values.get("prompt")
    if isinstance(prompt, str):
        return {**row.values, "prompt": _filled(template, prompt, row.values, row.where)}
    if isinstance(prompt, list) and prompt:
        *before, last = prompt
        text = _filled(template, last["content"], row.values, row.where)
        return {**row.values, "prompt": [*before, {**last, "content": text}]}
    raise UserError(f"{row.where}: the row has no `prompt` for the template")


def _filled(template: str, prompt: str, values: Values, where: str) -> str:
    filled = {**values, "prompt": prompt}
    for name in columns_in(template):
        if not isinstance(filled.get(name), str | int | float):
            raise UserError(f"{where}: the template names `{name}`, and the row has no text or number there")
    return template.format_map(filled)
