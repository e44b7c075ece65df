"""Counts what autograd saves for the backward pass, without data.

The trunk is on the meta device, where tensors have shapes and no memory, and takes the same path through its layers as
in training.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from policies.logprobs import CHUNK, token_logprobs_and_entropy
from policies.probes import PROBE_ERRORS
from policies.trunk import Trunk

Storages = dict[int, UntypedStorage]
"""Storages by identity. They are kept, so that no other can take the place of one that is freed."""


@dataclass(frozen=True)
class SavedBytes:
    """What autograd saves of a forward pass of the trunk, without parameters and buffers.

    Attributes:
        all_layers: Bytes that are saved without gradient checkpointing.
        checkpointed: Bytes at the peak with it: what is saved between the layers, and of the largest layer, while it is
            recomputed.
    """

    all_layers: int
    checkpointed: int


class NeedsDataError(Exception):
    """A model cannot be run on the meta device."""


def count_packed(trunk: Trunk, role: str, lengths: Sequence[int]) -> SavedBytes:
    """Count what autograd saves of a forward pass of packed sequences.

    Args:
        trunk: A trunk on the meta device, without gradient checkpointing.
        role: The role whose adapter is used.
        lengths: Tokens of each sequence.

    Raises:
        NeedsDataError: The model's forward pass depends on more than shapes.
    """
    ids = torch.zeros(sum(lengths), dtype=torch.long, device="meta")  # [N]
    return _count(trunk, partial(trunk.hidden_packed, ids, lengths, role))


def count_shared_prompts(trunk: Trunk, role: str, lengths: Sequence[int]) -> SavedBytes:
    """As `count_packed`, for sequences of a prompt and several responses to it; each is as long as the longest."""
    shape = len(lengths), max(lengths)
    ids = torch.zeros(shape, dtype=torch.long, device="meta")  # [B, T]
    mask = torch.ones(shape[0], 1, shape[1], shape[1], dtype=torch.bool, device="meta")  # [B, 1, T, T]
    return _count(trunk, partial(trunk.hidden_shared_prompts, ids, ids, mask, role))


def count_logits(trunk: Trunk, role: str, tokens: int, learn_entropy: bool = False) -> int:
    """The most bytes that tensors over the vocabulary take at one time while log-probabilities are trained.

    Args:
        trunk: A trunk on the meta device.
        role: The role whose LM head is used.
        tokens: Tokens whose log-probabilities are computed, `CHUNK` of them at a time.
        learn_entropy: Whether the entropy is trained too.
    """
    positions = min(tokens, CHUNK)
    hidden = torch.zeros(positions, trunk.width, dtype=trunk.causal.dtype, device="meta", requires_grad=True)  # [P, H]
    ids = torch.zeros(positions, dtype=torch.long, device="meta")  # [P]
    weight = trunk.causal.get_output_embeddings().weight  # [V, H]
    before = _storages(list(trunk.parameters()))
    with _Peak(positions * len(weight), before) as live, _WithoutData(), torch.enable_grad():
        logprobs, entropy = token_logprobs_and_entropy(
            hidden, ids, partial(trunk.head, role=role), temperature=1.0, learn_entropy=learn_entropy
        )
        torch.autograd.grad((logprobs + entropy).sum(), hidden)
    return live.peak


def _count(trunk: Trunk, forward: Callable[[], Tensor]) -> SavedBytes:
    """Count what autograd saves of a forward pass of the trunk."""
    saved = _SavedTensors(trunk)
    try:
        with saved.recorded(), _WithoutData(), torch.enable_grad():
            forward()
    except PROBE_ERRORS as error:
        raise NeedsDataError(f"{type(trunk.causal).__name__} cannot be run without data: {error}") from error
    return saved.bytes


class _SavedTensors:
    """Storages that autograd saves during a forward pass: those of each decoder layer, and those between layers."""

    def __init__(self, trunk: Trunk) -> None:
        self._trunk = trunk
        self._frozen = _storages([*trunk.parameters(), *trunk.buffers()])
        self._outside: Storages = {}
        self._inputs: Storages = {}
        self._layers: list[Storages] = []
        self._current = self._outside

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the storages within the block."""
        layers = [module for module in self._trunk.modules() if isinstance(module, GradientCheckpointingLayer)]
        hooks = [layer.register_forward_pre_hook(self._enter) for layer in layers]
        hooks += [layer.register_forward_hook(self._leave) for layer in layers]
        try:
            with saved_tensors_hooks(self._save, _never_unpacked):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def bytes(self) -> SavedBytes:
        """The bytes of what has been recorded."""
        every = dict(self._outside)
        for layer in self._layers:
            every |= layer
        between = self._outside | self._inputs
        largest = max((_size(layer, without=between) for layer in self._layers), default=0)
        return SavedBytes(_size(every), _size(between) + largest)

    def _save(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._frozen:
            self._current[storage._cdata] = storage

    def _enter(self, layer: Any, inputs: tuple[Any, ...]) -> None:
        """Before a layer: checkpointing keeps its positional arguments."""
        self._inputs |= _storages([value for value in inputs if isinstance(value, Tensor)])
        self._layers.append({})
        self._current = self._layers[-1]

    def _leave(self, layer: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        self._current = self._outside


def _storages(tensors: Sequence[Tensor]) -> Storages:
    storages: Storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
    return storages


def _size(storages: Storages, without: Storages | None = None) -> int:
    """The bytes of storages that are not among others."""
    others = without or {}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in others)


def _never_unpacked(_: Any) -> Tensor:
    raise RuntimeError("nothing is differentiated here")


class _Peak(TorchDispatchMode):
    """Notes how many bytes the storages of at least some size take at one time, without those that exist before."""

    def __init__(self, least: int, before: Storages) -> None:
        super().__init__()
        self.peak = 0
        self._least = least
        self._before = before
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for storage in _storages([leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]).values():
            is_new = storage._cdata not in self._before and storage._cdata not in self._live
            if is_new and storage.nbytes() >= self._least:
                self._live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self._live.values()))
        return outputs


class _WithoutData(TorchFunctionMode):
    """Replaces what needs data, or saves something else without, by what saves the same as on a real device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = REPLACEMENTS.get(function, function)
        return replacement(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Torch's attention, fused where it is on a CPU: then it keeps one number per query and head.

    On the meta device torch always chooses the form that keeps the attention weights.
    """
    same_heads = query.shape[1] == key.shape[1] or options.get("enable_gqa")
    if dropout_p or query.shape[-1] != value.shape[-1] or not same_heads:
        options |= {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
        return scaled_dot_product_attention(query, key, value, **options)
    mask = None if attn_mask is None else attn_mask.to(query.dtype)  # as torch converts masks of bool
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, _ = fused(query, key, value, is_causal=is_causal, attn_mask=mask, scale=options.get("scale"))
    return out


def _grouped_product(inputs: Tensor, weights: Tensor, **_: Any) -> Tensor:
    """Inputs `[N, in]` times the weights `[experts, in, out]` of their experts; torch's is for bfloat16 alone here."""
    return inputs @ weights[0]


def _addmm_(total: Tensor, *factors: Tensor, **options: Any) -> Tensor:
    """The sum in place, which changes no shape. Torch's own form for tensors without data takes milliseconds."""
    return total.addmm_(*factors, **options) if torch.is_grad_enabled() else total


def _all(*_: Any, **__: Any) -> Tensor:
    """The answer to what transformers asks about masks and positions: nothing is padded, no sequences are joined."""
    return torch.tensor(True)


def _first(_: Tensor) -> int:
    """A token's id, which is in any vocabulary."""
    return 0


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    scaled_dot_product_attention: _attention,
    torch._grouped_mm: _grouped_product,
    Tensor.addmm_: _addmm_,
    Tensor.all: _all,
    Tensor.__int__: _first,
}
