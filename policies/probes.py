"""Probes what a model supports, by forward passes on a few tokens."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies.batching import collate, collate_shared_prompts
from policies.errors import UserError
from policies.files.complete_weights import check_finite
from policies.layers.attention import ATTENTION_NAME
from policies.layers.packing import PackedSequences

PROBED_IDS = 32
"""Tokens, from the whole vocabulary, whose logits are compared with the model's."""
PROBED_SEQUENCES = 4
LARGE_LOGIT = 100.0
"""The largest output of the LM head in the second comparison: above the soft caps in use, which are 15 to 50."""
LARGE_STATE = 1e4
"""The largest number in the hidden states of the second comparison, which float16 can hold."""
PROBE_ERRORS = (TypeError, ValueError, RuntimeError)
"""What models raise that do not take the arguments of a probe."""
FLOAT32_ROUNDING = 1e-4
"""The part of their norm by which states may differ in float32, which is far more than rounding and far less than what
a wrong mask or position does."""
LAYER_ROUNDING = 3
"""Units of rounding per layer by which states may differ; as independent errors they grow with the root of the number
of layers. Three times what models of 2 and of 16 layers show in bfloat16."""
LOGIT_ROUNDING = 8
"""Units in the last place of the largest logit by which logits may differ."""


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

    They are compared as they are, and with hidden states so large that a soft cap bends them: the logits of a model
    that is hardly trained are far below any cap.

    Raises UserError where they differ, or are not finite.
    """
    model = trunk.causal
    size = model.config.get_text_config().vocab_size
    ids = torch.linspace(0, size - 1, PROBED_IDS).long().view(PROBED_SEQUENCES, -1).to(model.device)  # [B, T]
    trunk.switch("")
    expected = model(input_ids=ids, use_cache=False).logits  # [B, T, V]
    if not expected.isfinite().all():
        check_finite(model, f"model {model.config.name_or_path}")
        dtype = str(expected.dtype).removeprefix("torch.")
        raise UserError(f"{type(model).__name__}: its logits are not finite in {dtype}: set another model.dtype")
    hidden = trunk.hidden(ids, "")  # [B, T, H]
    _check_logits(trunk, expected, trunk.head(hidden, ""))
    head = model.get_output_embeddings()
    factor = min(LARGE_LOGIT / _largest(head(hidden)), LARGE_STATE / _largest(hidden))
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor, *inputs[1:]))
    try:
        expected = model(input_ids=ids, use_cache=False).logits  # [B, T, V]
        _check_logits(trunk, expected, trunk.head(hidden, ""))
    finally:
        hook.remove()


def _largest(tensor: Tensor) -> float:
    """The largest absolute number in a tensor; not zero, to divide by it."""
    return max(float(tensor.abs().max()), 1e-9)


def _check_logits(trunk: ProbedTrunk, expected: Tensor, logits: Tensor) -> None:
    """Raise UserError where logits differ from the model's by more than the rounding of their dtype."""
    rounding = LOGIT_ROUNDING * max(torch.finfo(expected.dtype).eps, torch.finfo(logits.dtype).eps)
    expected = expected.float()
    difference = (logits.float() - expected).abs().max()
    if not difference <= rounding * expected.abs().max():
        raise UserError(
            f"{type(trunk.causal).__name__} does more to its logits than its LM head, a factor and a soft cap under "
            "the names that policies.logits has: this model family is not supported"
        )


@torch.no_grad()
def supports_packing(trunk: ProbedTrunk) -> bool:
    """Whether packed sequences have the same states as each sequence alone.

    Not every model family hands extra arguments to its attention, and sliding windows are part of the mask.
    """
    model = trunk.causal
    if model.config._attn_implementation != ATTENTION_NAME or not has_full_attention(model):
        return False
    if model.device.type == "meta":
        return True  # there are no states to compare; the few models that need padding save as much with it
    lengths = [5, 2, 3]
    ids = torch.arange(10, device=model.device) % model.config.get_text_config().vocab_size  # [N]
    trunk.switch("")
    try:
        packed = trunk.packed_states(ids, PackedSequences.of(lengths, ids.device))  # [N, H]
    except PROBE_ERRORS as error:
        _raise_shortage(error)
        return False
    alone = [trunk.hidden(sequence.unsqueeze(0), "").squeeze(0) for sequence in ids.split(lengths)]  # [T, H] each
    return states_agree(packed, torch.cat(alone))


@torch.no_grad()
def supports_shared_prompts(trunk: ProbedTrunk, role: str) -> bool:
    """Whether responses after one shared prompt have the same states as each response after its own copy.

    Not every model family uses the mask and the positions that it is given, and sliding windows count the tokens of
    the responses in between. What a response does not attend to must not change its states, whatever their dtype: it is
    multiplied by zero. Apart from that they may differ by rounding, which adds up over the layers.
    """
    if trunk.causal.device.type == "meta" or not has_full_attention(trunk.causal):
        return False
    prompt = [5, 6, 7]
    first, second, other = [8, 9], [10, 11, 12], [13, 14]
    try:
        states = _shared_prompt_states(trunk, role, prompt, [first, second])  # [2, H]
        beside_other = _shared_prompt_states(trunk, role, prompt, [other, second])  # [2, H]
    except PROBE_ERRORS as error:
        _raise_shortage(error)
        return False
    alone = collate([prompt, prompt], [first, second])
    device = trunk.causal.device
    expected = trunk.hidden_packed(alone.ids.to(device), alone.lengths, role)[alone.last.to(device)]  # [2, H]
    layers = trunk.causal.config.get_text_config().num_hidden_layers
    rounding = max(FLOAT32_ROUNDING, LAYER_ROUNDING * torch.finfo(expected.dtype).eps * math.sqrt(layers))
    is_independent = _distance(beside_other[1], states[1]) <= FLOAT32_ROUNDING
    return is_independent and _distance(states, expected) <= rounding


def _distance(states: Tensor, expected: Tensor) -> float:
    """The norm of the difference as a part of the norm."""
    return float((states - expected).float().norm() / expected.float().norm())


def _shared_prompt_states(
    trunk: ProbedTrunk, role: str, prompt: Sequence[int], responses: Sequence[Sequence[int]]
) -> Tensor:
    """States `[R, H]` at the last token of each response, all after one copy of the prompt."""
    device = trunk.causal.device
    batch = collate_shared_prompts([prompt], [responses])
    ids = batch.ids.to(device)  # [1, T]
    positions = batch.positions.to(device)  # [1, T]
    mask = batch.attention_mask.to(device)  # [1, 1, T, T]
    return trunk.hidden_shared_prompts(ids, positions, mask, role).flatten(0, 1)[batch.last.to(device)]


def _raise_shortage(error: Exception) -> None:
    """Raise an error again that says nothing about the model: the device lacks memory, or has failed."""
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or "memory" in str(error):
        raise error


def states_agree(states: Tensor, expected: Tensor) -> bool:
    """Whether states are equal up to the rounding of their dtype, by the norm of the difference."""
    rounding = FLOAT32_ROUNDING if expected.dtype == torch.float32 else 0.02
    return _distance(states, expected) <= rounding


def has_full_attention(model: PreTrainedModel) -> bool:
    """Whether the model has attention over the whole sequence, without a sliding window."""
    return not getattr(model.config.get_text_config(), "sliding_window", None)
