from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from policies.build import make_trunk
from policies.layers import native
from policies.layers.rms_norm import RmsNormForward, _RmsNorm
from policies.schema import PolicySettings
from tests.policies.gradients import gradient


def norm_of(width: int) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(width)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, width))
    return norm.requires_grad_(False)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("width", [5, 32, 40])
def test_values_and_gradients_are_those_in_double_precision(width: int, dtype: torch.dtype, bound: float) -> None:
    norm = norm_of(width).to(dtype)
    x = torch.randn(3, 7, width, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    out = RmsNormForward(norm)(x)
    scale = (exact.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    expected = norm.weight.double() * exact * scale
    for result in (out, expected):
        result.sin().sum().backward()
    for ours, theirs in ((out, expected), (gradient(x), gradient(exact))):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= bound * theirs.norm()


@pytest.mark.parametrize("case", ["mixed", "trained", "not compiled"])
def test_other_cases_are_left_to_the_module(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = norm_of(8)
    x = torch.randn(2, 8)
    if case == "mixed":
        x = x.bfloat16()
    elif case == "trained":
        norm.weight.requires_grad_(True)
    else:
        monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(_RmsNorm, "apply", None)
    assert torch.equal(RmsNormForward(norm)(x), norm(x))
    assert RmsNormForward(norm)(x).requires_grad == (case == "trained")


def test_a_trunk_uses_it_in_every_norm(tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    trunk = make_trunk(base, PolicySettings(rank=4), ("policy",))
    norms = [m for m in trunk.modules() if isinstance(m, LlamaRMSNorm)]
    assert len(norms) == 5
    assert all(isinstance(vars(m)["forward"], RmsNormForward) for m in norms)
