from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from policies import attention, packing
from policies.attention import NAME, SHORT, _ShortAttention
from policies.methods import make_trunk
from policies.packing import Rows
from policies.schema import PolicySettings

SHAPES = [([7, 7, 7], 4, 2, 8), ([1], 8, 8, 4), ([24, 13], 6, 1, 8), ([5, 13, 1, 2, 12], 2, 2, 16)]
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


@pytest.mark.parametrize("pairs", [1, 400, packing.PAIRS])
@pytest.mark.parametrize(("lengths", "heads", "groups", "width"), SHAPES)
def test_values_and_gradients_are_those_of_the_fused_kernel(
    lengths: list[int], heads: int, groups: int, width: int, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "PAIRS", pairs)
    lengths = sorted(lengths)
    inputs = states(sum(lengths), heads, groups, width, torch.float32)
    expected = attend(inputs, lengths)
    outer = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(expected, inputs, outer)
    made = _ShortAttention.apply(*inputs, 0.3, Rows.of(lengths, torch.device("cpu")))
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(made, inputs, outer), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("lengths", "heads", "groups", "width"), SHAPES[:2])
def test_gradients_agree_with_finite_differences(lengths: list[int], heads: int, groups: int, width: int) -> None:
    rows = Rows.of(lengths, torch.device("cpu"))
    inputs = states(sum(lengths), heads, groups, width, torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: _ShortAttention.apply(*inputs, 0.3, rows), inputs)


@pytest.mark.parametrize(("length", "short"), [(SHORT[torch.float32] * 8, True), (SHORT[torch.float32] * 8 + 1, False)])
def test_a_model_attends_by_it_in_short_rows_while_gradients_flow(
    length: int, short: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(2, 290, (2, length), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = plain.model(input_ids=ids).last_hidden_state
    trunk = make_trunk(plain, PolicySettings(rank=2, alpha=2), ("policy",))
    assert trunk.causal.config._attn_implementation == NAME
    shapes: list[torch.Size] = []
    apply = _ShortAttention.apply
    monkeypatch.setattr(attention._ShortAttention, "apply", lambda *a: (shapes.append(a[0].shape), apply(*a))[1])
    with torch.no_grad():
        torch.testing.assert_close(trunk.hidden(ids, "policy"), expected, rtol=1e-4, atol=1e-4)
    assert not shapes
    trunk.train_only("policy")
    torch.testing.assert_close(trunk.hidden(ids, "policy"), expected, rtol=1e-4, atol=1e-4)
    assert bool(shapes) is short


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
