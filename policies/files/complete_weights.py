"""Loads a model only where all of its weights are in its files: transformers would initialise the others at random."""

import logging
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from policies.errors import UserError
from policies.files.quantization import is_packed
from policies.files.safe_reading import SAFE

log = logging.getLogger(__name__)

NAMED = 3
"""Tensors that a message names."""
ADAPTER_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "ia3_l")
"""Parts of the names of PEFT's tensors."""


def load_complete(loader: Any, path: str, device: torch.device, **options: Any) -> PreTrainedModel:
    """Load a model, and check that each of its weights was in its files, with the right shape, and is finite.

    accelerate makes it on the meta device and places each weight as it is read: no copy of the model is ever elsewhere.

    Args:
        loader: An auto class of transformers.
        path: Folder or hub name of the model.
        device: The device to load it to.
        **options: More arguments of `from_pretrained`.

    Raises:
        UserError: A weight is missing, has another shape, or is not finite; or the files hold other weights than the
            model's.
    """
    # transformers itself refuses a weight of another shape, but does not say which.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "device_map": {"": device}}
    model, loading = loader.from_pretrained(path, **options, **SAFE)
    unused = sorted(loading["unexpected_keys"])
    if loading["missing_keys"]:
        raise UserError(_about_missing(model, path, sorted(loading["missing_keys"]), unused))
    _check_shapes(model, path, loading["mismatched_keys"])
    if unused:
        _check_unused(model, path, unused)
    check_finite(model, f"model {path}")
    return model


def _about_missing(model: PreTrainedModel, path: str, missing: list[str], unused: list[str]) -> str:
    """The message for weights that are not in the files."""
    message = (
        f"model {path} cannot be loaded: its files lack {len(missing)} of the weights of {type(model).__name__}"
        f"{_examples(missing)}"
    )
    prefixes = {prefix for name in unused if (prefix := _prefix_before(name, missing))}
    if len(prefixes) == 1:
        return f"{message}; the names in the files begin with {prefixes.pop()!r}, which must be removed"
    if unused:
        return f"{message}; they are weights of another kind of model, and hold {len(unused)} others{_examples(unused)}"
    return message


def _prefix_before(name: str, expected: Iterable[str]) -> str:
    """What stands before an expected name in a longer one; empty where it contains none."""
    for candidate in expected:
        if name.endswith(f".{candidate}"):
            return name.removesuffix(candidate)
    return ""


def _check_shapes(model: PreTrainedModel, path: str, mismatched: Collection[tuple[str, Any, Any]]) -> None:
    """Raise UserError where a weight has another shape in the files than config.json gives it."""
    for name, found, expected in sorted(mismatched):
        _refuse_shape(path, name, found, expected)
    if not any(is_packed(module) for module in model.modules()):
        return
    # Of a model that it quantises, transformers takes weights of any shape.
    with torch.device("meta"):
        planned = dict(type(model)(model.config).named_parameters())
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        found = list(parameter.shape if state is None else state.shape)
        expected = list(planned[name].shape)
        if found != expected and (state is None or found != expected[::-1]):  # GPT-2's layers are stored transposed
            _refuse_shape(path, name, found, expected)


def _refuse_shape(path: str, name: str, found: Iterable[int], expected: Iterable[int]) -> None:
    raise UserError(
        f"model {path} cannot be loaded: the shape of {name} is {list(found)}, but {list(expected)} by config.json"
    )


def _check_unused(model: PreTrainedModel, path: str, unused: list[str]) -> None:
    """Refuse tensors that should have been used, and warn of others.

    Raises UserError where they belong to an adapter, or are weights of the model under a second name.
    """
    adapter = [name for name in unused if set(name.split(".")) & set(ADAPTER_PARTS)]
    if adapter:
        raise UserError(
            f"model {path} cannot be loaded: its weights hold an adapter that is not merged into them"
            f"{_examples(adapter)}; merge it by PEFT's merge_and_unload before saving"
        )
    own = [name for name, _ in model.named_parameters()]
    for name in unused:
        if prefix := _prefix_before(name, own):
            raise UserError(
                f"model {path} cannot be loaded: its files hold {name} beside {name.removeprefix(prefix)}; "
                "remove the one that is not the model's"
            )
    _warn_of_unused(path, type(model).__name__, tuple(unused))


@cache
def _warn_of_unused(path: str, kind: str, unused: tuple[str, ...]) -> None:
    """Say once that tensors have no place in the model; each stage loads it again."""
    tensors = "1 tensor" if len(unused) == 1 else f"{len(unused)} tensors"
    log.warning("model %s: its files hold %s that %s does not use%s", path, tensors, kind, _examples(unused))


def _examples(names: Collection[str]) -> str:
    """The first names, for the end of a clause."""
    shown = ", ".join(list(names)[:NAMED])
    return f": {shown}" if len(names) <= NAMED else f", such as {shown}"


def check_finite(model: nn.Module, what: str) -> None:
    """Raise UserError where a weight holds NaN or infinite numbers. what: the model, for the message."""
    for name, tensor in _tensors(model):
        if not is_finite(tensor):
            raise UserError(
                f"{what}: {name} holds NaN or infinite numbers in {str(tensor.dtype).removeprefix('torch.')}; "
                "its file is damaged, or its training diverged, or its numbers are too large for this dtype"
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters, and the scales of those in four bits, by the parameter's name."""
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        scales = () if state is None else (state.absmax, state.offset, getattr(state.state2, "absmax", None))
        for tensor in (parameter, *scales):
            if tensor is not None:
                yield name, tensor.detach()


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinite number, in one pass and without memory of its size."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    least, greatest = tensor.aminmax()
    return bool(least.isfinite() and greatest.isfinite())
