from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from policies.methods import make_trunk
from policies.norms import FrozenRmsNorm, _RmsNorm
from policies.schema import PolicySettings


def norm_of(width: int) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(width)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, width))
    return norm.requires_grad_(False)


def test_values_and_gradients_are_those_of_transformers() -> None:
    norm = norm_of(32)
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    one, other = FrozenRmsNorm(norm)(ours), norm(theirs)
    torch.testing.assert_close(one, other)
    for out in (one, other):
        out.sin().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_finite_differences_agree() -> None:
    x = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: _RmsNorm.apply(x, weight, 1e-6), (x,))


@pytest.mark.parametrize("case", ["bfloat16", "trained"])
def test_other_cases_are_left_to_the_module(case: str) -> None:
    norm = norm_of(8)
    x = torch.randn(2, 8)
    if case == "bfloat16":
        x = x.bfloat16()
    else:
        norm.weight.requires_grad_(True)
    assert torch.equal(FrozenRmsNorm(norm)(x), norm(x))
    assert FrozenRmsNorm(norm)(x).requires_grad == (case == "trained")


def test_a_trunk_has_it_in_every_norm(tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    trunk = make_trunk(base, PolicySettings(rank=4), ("policy",))
    norms = [m for m in trunk.modules() if isinstance(m, LlamaRMSNorm)]
    assert len(norms) == 5
    assert all(isinstance(vars(m)["forward"], FrozenRmsNorm) for m in norms)
