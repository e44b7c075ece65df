"""Values that users' functions return, described for error messages."""

from typing import Any

from torch import Tensor

from policies.text.columns import shown

MAX_ITEMS = 4
"""Items of a container that are described; the message of a batch stays readable."""


def describe(value: Any) -> str:
    """Describe a value without reading the numbers of tensors: `(float32 [3], None)`."""
    if isinstance(value, Tensor):
        device = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{device}"
    if isinstance(value, tuple | list):
        items = [describe(item) for item in value[:MAX_ITEMS]]
        if len(value) > MAX_ITEMS:
            items.append(f"… {len(value)} items")
        text = ", ".join(items)
        return f"({text})" if isinstance(value, tuple) else f"[{text}]"
    if isinstance(value, dict):
        return f"a dict with the keys {shown(list(value))}"
    return shown(value)
