from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from policies.layers.rotary import _in_place_of, _Rotation, _turns_halves
from policies.methods.build import make_trunk
from policies.schema import PolicySettings


def states(dtype: torch.dtype = torch.float32, width: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, cosines and sines of angles that differ between the halves, as in no family but allowed."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 5, n, width, generator=generator, dtype=dtype).transpose(1, 2) for n in (4, 2))
    angles = torch.randn(2, 5, width, generator=generator, dtype=torch.float64)
    return query.requires_grad_(), key.requires_grad_(), angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("width", [8, 64, 80])
def test_values_and_gradients_are_those_of_transformers(width: int, dtype: torch.dtype, bound: float) -> None:
    query, key, cos, sin = states(dtype, width)
    expected = apply_rotary_pos_emb(query, key, cos, sin)
    made = _in_place_of(apply_rotary_pos_emb)(query, key, cos, sin)
    outers = [torch.randn(part.shape, generator=torch.Generator().manual_seed(1)).to(dtype) for part in expected]
    theirs = [*expected, *torch.autograd.grad(expected, (query, key), outers)]
    for one, other in zip([*made, *torch.autograd.grad(made, (query, key), outers)], theirs, strict=True):
        assert one.dtype == dtype
        assert (one - other).norm() <= bound * other.norm()


def test_rows_may_share_their_angles() -> None:
    query, key, cos, sin = states()
    shared = cos[:1], sin[:1]
    made = _in_place_of(apply_rotary_pos_emb)(query, key, *shared)
    torch.testing.assert_close(made, apply_rotary_pos_emb(query, key, *shared))


def test_a_function_that_turns_neighbours_is_left_alone() -> None:
    assert _turns_halves(apply_rotary_pos_emb)
    assert not _turns_halves(modeling_glm.apply_rotary_pos_emb)


@pytest.mark.parametrize("case", ["part of a head", "another dtype", "another dimension"])
def test_other_cases_are_left_to_transformers(case: str) -> None:
    query, key, cos, sin = states()
    named = {"unsqueeze_dim": 2} if case == "another dimension" else {}
    if case == "part of a head":
        cos, sin = cos[..., :4], sin[..., :4]
    if case == "another dtype":
        query, key = query.bfloat16(), key.bfloat16()
    given: list[tuple[Tensor, ...]] = []
    _in_place_of(lambda *a, **_: given.append(a))(query, key, cos, sin, **named)
    assert len(given) == 1
    assert all(one is other for one, other in zip(given[0], (query, key, cos, sin), strict=True))


def test_the_layers_of_a_trunk_use_it_and_no_other_model_does(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    trunk = make_trunk(base, PolicySettings(rank=4), ("policy",))
    called = []
    turned = _Rotation.apply
    monkeypatch.setattr(_Rotation, "apply", lambda *a: (called.append(1), turned(*a))[1])
    ids = torch.arange(3, 12).unsqueeze(0)
    expected = plain.model(input_ids=ids).last_hidden_state
    assert modeling_llama.apply_rotary_pos_emb is apply_rotary_pos_emb
    assert not called
    torch.testing.assert_close(trunk.hidden(ids, "policy"), expected, rtol=1e-4, atol=1e-5)
    assert len(called) == 2 * base.config.num_hidden_layers
