from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from policies.layers import attention, native
from policies.layers.attention import NAME, SHORT, _OwnAttention
from policies.layers.packing import cu_seqlens_of
from policies.methods.build import make_trunk
from policies.schema import PolicySettings

SHAPES = [([7, 7, 7], 4, 2, 8), ([1], 8, 8, 4), ([130, 13], 6, 1, 40), ([5, 33, 1, 16, 17, 32], 2, 2, 64)]
"""Tokens of each row, heads, groups and the width of a head."""


def states(tokens: int, heads: int, groups: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value `[N, heads or groups, D]`, which lie head by head, as some families have them."""
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(n, tokens, width, generator=generator, dtype=dtype) for n in (heads, groups, groups))
    return [state.transpose(0, 1).requires_grad_() for state in made]


def attend(inputs: list[Tensor], lengths: list[int]) -> Tensor:
    """`[N, heads, D]`, row by row, by the fused kernel."""
    made = []
    for query, *others in zip(*(state.split(lengths) for state in inputs), strict=True):
        repeats = query.shape[1] // others[0].shape[1]
        key, value = (state.repeat_interleave(repeats, dim=1).transpose(0, 1) for state in others)
        row = scaled_dot_product_attention(query.transpose(0, 1), key, value, is_causal=True, scale=0.3)
        made.append(row.transpose(0, 1))
    return torch.cat(made)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("lengths", "heads", "groups", "width"), SHAPES)
def test_values_and_gradients_are_those_in_double_precision(
    lengths: list[int], heads: int, groups: int, width: int, dtype: torch.dtype, bound: float
) -> None:
    inputs = states(sum(lengths), heads, groups, width, dtype)
    exact = [state.detach().double().requires_grad_() for state in inputs]
    expected = attend(exact, lengths)
    outer = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    made = _OwnAttention.apply(*(state.contiguous() for state in inputs), 0.3, cu_seqlens_of(lengths))
    expected_all = [expected, *torch.autograd.grad(expected, exact, outer.double())]
    for ours, theirs in zip([made, *torch.autograd.grad(made, inputs, outer)], expected_all, strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= bound * max(theirs.norm(), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_to_the_bit_alone_and_among_others_on_any_number_of_threads(dtype: torch.dtype) -> None:
    lengths = [5, 33, 1, 16, 70]
    inputs = [state.contiguous().detach().requires_grad_() for state in states(sum(lengths), 4, 2, 24, dtype)]
    outer = torch.randn(sum(lengths), 4, 24, generator=torch.Generator().manual_seed(1)).to(dtype)

    def results(lengths: list[int], inputs: list[Tensor], outer: Tensor) -> list[Tensor]:
        made = _OwnAttention.apply(*inputs, 0.3, cu_seqlens_of(lengths))
        return [made, *torch.autograd.grad(made, inputs, outer)]

    together, threads = results(lengths, inputs, outer), torch.get_num_threads()
    torch.set_num_threads(1 + threads % 2)
    try:
        parts = zip(*(state.detach().split(lengths) for state in (*inputs, outer)), strict=True)
        alone = [results([len(part[0])], [p.requires_grad_() for p in part[:3]], part[3]) for part in parts]
    finally:
        torch.set_num_threads(threads)
    for whole, *rows in zip(together, *alone, strict=True):
        assert torch.equal(whole, torch.cat(rows))


def test_what_is_no_number_stays_none_and_in_its_row() -> None:
    inputs = [state.contiguous().detach() for state in states(9, 2, 2, 8, torch.bfloat16)]
    inputs[1][6] = torch.nan  # the second token of the second row
    made = _OwnAttention.apply(*inputs, 0.3, cu_seqlens_of([5, 4]))
    assert made[:5].isfinite().all()
    assert made[6:].isnan().all()


@pytest.mark.parametrize(("length", "short"), [(SHORT // 8, True), (SHORT // 8 + 1, False)])
def test_only_short_rows_go_by_it(length: int, short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_OwnAttention, "apply", lambda query, *_: query)
    query = torch.zeros(1, 1, length, 8)
    query[..., 0] = 1
    made, _ = attention._attention(torch.nn.Identity(), query, query, torch.zeros_like(query), None)
    assert bool(made.any()) is short


@pytest.mark.parametrize("compiled", [True, False])
def test_a_model_attends_as_it_did(compiled: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(2, 290, (2, 70), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = plain.model(input_ids=ids).last_hidden_state
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    trunk = make_trunk(plain, PolicySettings(rank=2, alpha=2), ("policy",))
    assert trunk.causal.config._attn_implementation == NAME
    calls: list[torch.Size] = []
    apply = _OwnAttention.apply
    monkeypatch.setattr(_OwnAttention, "apply", lambda *a: (calls.append(a[0].shape), apply(*a))[1])
    torch.testing.assert_close(trunk.hidden(ids, "policy"), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == compiled * plain.config.num_hidden_layers


@pytest.mark.parametrize("new", [1, 24])
def test_narrow_heads_in_bfloat16_attend_as_in_float32(new: int) -> None:
    """Large scores are too coarse in bfloat16 for a softmax."""
    flat = states(3 * 24, 4, 2, 8, torch.bfloat16)
    query, key, value = (state.detach().unflatten(0, (3, 24)).transpose(1, 2) for state in flat)
    query = 8 * query[:, :, -new:]
    whole = [state.float().repeat_interleave(2, dim=1) for state in (key, value)]
    expected = scaled_dot_product_attention(query.float(), *whole, is_causal=new > 1, scale=0.3).transpose(1, 2)
    with torch.set_grad_enabled(new > 1):
        made, _ = attention._attention(torch.nn.Identity(), query, key, value, None, scaling=0.3)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.float(), expected, rtol=2**-8, atol=1e-5)
