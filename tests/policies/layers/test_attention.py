from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from policies.build import make_trunk
from policies.layers import attention, native
from policies.layers.attention import ATTENTION_NAME, MAX_KERNEL_SIZE, _PackedAttention
from policies.layers.packing import cu_seqlens_of
from policies.schema import PolicySettings

SHAPES = [([7, 7, 7], 4, 2, 8), ([1], 8, 8, 4), ([130, 13], 6, 1, 40), ([5, 33, 1, 16, 17, 32], 2, 2, 64)]
"""Tokens of each sequence, heads, groups and head_dim."""


def states(tokens: int, heads: int, groups: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value `[N, heads or groups, D]`, stored head by head, as some families have them."""
    generator = torch.Generator().manual_seed(0)
    by_head = (torch.randn(n, tokens, width, generator=generator, dtype=dtype) for n in (heads, groups, groups))
    return [state.transpose(0, 1).requires_grad_() for state in by_head]


def attend(inputs: list[Tensor], lengths: list[int]) -> Tensor:
    """`[N, heads, D]`, sequence by sequence, by the fused kernel."""
    outputs = []
    for query, *others in zip(*(state.split(lengths) for state in inputs), strict=True):
        repeats = query.shape[1] // others[0].shape[1]
        key, value = (state.repeat_interleave(repeats, dim=1).transpose(0, 1) for state in others)
        out = scaled_dot_product_attention(query.transpose(0, 1), key, value, is_causal=True, scale=0.3)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("lengths", "heads", "groups", "width"), SHAPES)
def test_values_and_gradients_are_those_in_double_precision(
    lengths: list[int], heads: int, groups: int, width: int, dtype: torch.dtype, bound: float
) -> None:
    inputs = states(sum(lengths), heads, groups, width, dtype)
    exact = [state.detach().double().requires_grad_() for state in inputs]
    expected = attend(exact, lengths)
    outer = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = _PackedAttention.apply(*(state.contiguous() for state in inputs), cu_seqlens_of(lengths), 0.3)
    expected_all = [expected, *torch.autograd.grad(expected, exact, outer.double())]
    for ours, theirs in zip([out, *torch.autograd.grad(out, inputs, outer)], expected_all, strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= bound * max(theirs.norm(), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_is_the_same_to_the_bit_alone_and_among_others_on_any_number_of_threads(dtype: torch.dtype) -> None:
    lengths = [5, 33, 1, 16, 70]
    inputs = [state.contiguous().detach().requires_grad_() for state in states(sum(lengths), 4, 2, 24, dtype)]
    outer = torch.randn(sum(lengths), 4, 24, generator=torch.Generator().manual_seed(1)).to(dtype)

    def results(lengths: list[int], inputs: list[Tensor], outer: Tensor) -> list[Tensor]:
        out = _PackedAttention.apply(*inputs, cu_seqlens_of(lengths), 0.3)
        return [out, *torch.autograd.grad(out, inputs, outer)]

    together, threads = results(lengths, inputs, outer), torch.get_num_threads()
    torch.set_num_threads(1 + threads % 2)
    try:
        alone = []
        for *states_alone, outer_alone in zip(*(state.detach().split(lengths) for state in (*inputs, outer))):
            leaves = [state.requires_grad_() for state in states_alone]
            alone.append(results([len(outer_alone)], leaves, outer_alone))
    finally:
        torch.set_num_threads(threads)
    for packed, *parts in zip(together, *alone, strict=True):
        assert torch.equal(packed, torch.cat(parts))


def test_a_nan_stays_a_nan_and_in_its_sequence() -> None:
    inputs = [state.contiguous().detach() for state in states(9, 2, 2, 8, torch.bfloat16)]
    inputs[1][6] = torch.nan  # the second token of the second sequence
    out = _PackedAttention.apply(*inputs, cu_seqlens_of([5, 4]), 0.3)
    assert out[:5].isfinite().all()
    assert out[6:].isnan().all()


@pytest.mark.parametrize(("length", "short"), [(MAX_KERNEL_SIZE // 8, True), (MAX_KERNEL_SIZE // 8 + 1, False)])
def test_only_short_sequences_use_the_kernel(length: int, short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_PackedAttention, "apply", lambda query, *_: query)
    query = torch.zeros(1, 1, length, 8)
    query[..., 0] = 1
    out, _ = attention._attention(
        torch.nn.Identity(), query=query, key=query, value=torch.zeros_like(query), attention_mask=None
    )
    assert bool(out.any()) is short


@pytest.mark.parametrize("compiled", [True, False])
def test_a_model_attends_as_it_did(compiled: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(2, 290, (2, 70), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = plain.model(input_ids=ids).last_hidden_state
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    trunk = make_trunk(plain, PolicySettings(rank=2, alpha=2), ("policy",))
    assert trunk.causal.config._attn_implementation == ATTENTION_NAME
    calls: list[torch.Size] = []
    apply = _PackedAttention.apply

    def recorded(query: Tensor, *inputs: Any) -> Tensor:
        calls.append(query.shape)
        return apply(query, *inputs)

    monkeypatch.setattr(_PackedAttention, "apply", recorded)
    torch.testing.assert_close(trunk.hidden(ids, "policy"), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == compiled * plain.config.num_hidden_layers


@pytest.mark.parametrize("new", [1, 24])
def test_narrow_heads_in_bfloat16_attend_as_in_float32(new: int) -> None:
    """Large scores are too coarse in bfloat16 for a softmax."""
    flat = states(3 * 24, 4, 2, 8, torch.bfloat16)
    query, key, value = (state.detach().unflatten(0, (3, 24)).transpose(1, 2) for state in flat)
    query = 8 * query[:, :, -new:]
    keys, values = (state.float().repeat_interleave(2, dim=1) for state in (key, value))
    expected = scaled_dot_product_attention(query.float(), keys, values, is_causal=new > 1, scale=0.3).transpose(1, 2)
    with torch.set_grad_enabled(new > 1):
        out, _ = attention._attention(
            torch.nn.Identity(), query=query, key=key, value=value, attention_mask=None, scaling=0.3
        )
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=1e-5)
