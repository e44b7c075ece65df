from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from policies.gated import GatedPart, _Gated
from policies.methods import make_trunk
from policies.schema import PolicySettings


def part_of(act: str = "silu") -> LlamaMLP:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, hidden_act=act)
    return LlamaMLP(config).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_transformers_to_the_bit(dtype: torch.dtype) -> None:
    part = part_of().to(dtype)
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    one, other = GatedPart(part)(ours), part(theirs)
    assert torch.equal(one, other)
    for out in (one, other):
        out.float().sin().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_finite_differences_agree() -> None:
    gate, up = torch.randn(2, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.autograd.gradcheck(_Gated.apply, (gate.requires_grad_(), up.requires_grad_()))


def test_what_is_given_is_left_as_it_was() -> None:
    gate, up, outer = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).unbind()
    before = [tensor.clone() for tensor in (gate, up, outer)]
    made = _Gated.apply(gate.requires_grad_(), up.requires_grad_())
    made.backward(outer)
    assert all(torch.equal(*pair) for pair in zip(before, (gate, up, outer), strict=True))


def test_another_activation_is_left_to_the_module() -> None:
    assert GatedPart.fits(part_of())
    assert not GatedPart.fits(part_of("gelu"))


def test_a_trunk_has_it_in_every_layer(tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    trunk = make_trunk(base, PolicySettings(rank=4), ("policy",))
    parts = [m for m in trunk.modules() if isinstance(m, LlamaMLP)]
    assert len(parts) == 2
    assert all(isinstance(vars(m)["forward"], GatedPart) for m in parts)
