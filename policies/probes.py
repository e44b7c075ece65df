"""Probes what a model supports, by forward passes on a few tokens."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies.batching import collate, collate_shared_prompts
from policies.errors import UserError
from policies.layers.attention import ATTENTION_NAME
from policies.layers.packing import PackedSequences


class ProbedTrunk(Protocol):
    """The part of `Trunk` that the probes use; the methods are documented there."""

    causal: PreTrainedModel

    def switch(self, role: str) -> None: ...
    def hidden(self, ids: Tensor, role: str) -> Tensor: ...
    def hidden_packed(self, ids: Tensor, lengths: Sequence[int], role: str) -> Tensor: ...
    def packed_states(self, ids: Tensor, packed: PackedSequences) -> Tensor: ...
    def hidden_shared_prompts(self, ids: Tensor, positions: Tensor, attention_mask: Tensor, role: str) -> Tensor: ...
    def head(self, hidden: Tensor, role: str) -> Tensor: ...


@torch.no_grad()
def check_head(trunk: ProbedTrunk) -> None:
    """Check that `Trunk.head` gives the model's own logits; otherwise log-probabilities would be silently wrong.

    Raises UserError where it does not.
    """
    model = trunk.causal
    ids = torch.arange(4).unsqueeze(0).to(model.device)  # [1, T]
    trunk.switch("")
    expected = model(input_ids=ids, use_cache=False).logits.float()  # [1, T, V]
    logits = trunk.head(trunk.hidden(ids, ""), "").float()  # [1, T, V]
    if not torch.allclose(expected, logits, rtol=1e-2, atol=1e-2):
        raise UserError(
            f"{type(model).__name__} does more to its logits than its LM head and soft cap: "
            "this model family is not supported"
        )


@torch.no_grad()
def supports_packing(trunk: ProbedTrunk) -> bool:
    """Whether packed sequences have the same states as each sequence alone.

    Not every model family hands extra arguments to its attention, and sliding windows are part of the mask.
    """
    model = trunk.causal
    if model.config._attn_implementation != ATTENTION_NAME or not _has_full_attention(model):
        return False
    lengths = [5, 2, 3]
    ids = torch.arange(10, device=model.device) % model.config.get_text_config().vocab_size  # [N]
    trunk.switch("")
    try:
        packed = trunk.packed_states(ids, PackedSequences.of(lengths, ids.device))  # [N, H]
    except (TypeError, ValueError, RuntimeError):
        return False
    alone = [trunk.hidden(sequence.unsqueeze(0), "").squeeze(0) for sequence in ids.split(lengths)]  # [T, H] each
    return states_agree(packed, torch.cat(alone))


@torch.no_grad()
def supports_shared_prompts(trunk: ProbedTrunk, role: str) -> bool:
    """Whether responses after one shared prompt have the same states as each response after its own copy.

    Not every model family uses the mask and the positions that it is given, and sliding windows count the tokens of
    the responses in between.
    """
    device = trunk.causal.device
    if not _has_full_attention(trunk.causal):
        return False
    prompt = [5, 6, 7]
    responses = [[8, 9], [10, 11, 12]]
    shared = collate_shared_prompts([prompt], [responses])
    alone = collate([prompt, prompt], responses)
    ids = shared.ids.to(device)  # [1, T]
    positions = shared.positions.to(device)  # [1, T]
    mask = shared.attention_mask.to(device)  # [1, 1, T, T]
    try:
        states = trunk.hidden_shared_prompts(ids, positions, mask, role).flatten(0, 1)[shared.last]  # [2, H]
    except (TypeError, ValueError, RuntimeError):
        return False
    expected = trunk.hidden_packed(alone.ids.to(device), alone.lengths, role)[alone.last]  # [2, H]
    return torch.allclose(states, expected, rtol=1e-3, atol=1e-3)


def states_agree(states: Tensor, expected: Tensor) -> bool:
    """Whether states are equal up to the rounding of their dtype, by the norm of the difference."""
    rounding = 1e-4 if expected.dtype == torch.float32 else 0.02
    return bool((states - expected).float().norm() <= rounding * expected.float().norm())


def _has_full_attention(model: PreTrainedModel) -> bool:
    """Whether the model has weights, and attention over the whole sequence, without a sliding window."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return not window and model.device.type != "meta"
