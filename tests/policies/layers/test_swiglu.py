from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from policies.build import make_trunk
from policies.layers import native
from policies.layers.swiglu import SwigluForward, _Swiglu
from policies.schema import PolicySettings
from tests.policies.gradients import gradient


def mlp_of(act: str = "silu") -> LlamaMLP:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, hidden_act=act)
    return LlamaMLP(config).requires_grad_(False)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_values_and_gradients_are_those_of_transformers(
    dtype: torch.dtype, bound: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    mlp = mlp_of().to(dtype)
    x = 3 * torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    one, other = SwigluForward(mlp)(ours), mlp(theirs)
    for out in (one, other):
        out.float().sin().sum().backward()
    for made, expected in ((one, other), (gradient(ours), gradient(theirs))):
        assert (made - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("count", [1, 15, 16, 5000])
def test_the_unit_and_its_gradients_are_those_in_double_precision(count: int) -> None:
    """Also where the gate is so large or small that its exponential overflows or underflows."""
    gate, up, outer = torch.randn(3, count, generator=torch.Generator().manual_seed(0)).unbind()
    gate = gate * torch.logspace(-1, 3, count)
    inputs = gate.requires_grad_(), up.requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    made, expected = _Swiglu.apply(*inputs), torch.nn.functional.silu(exact[0]) * exact[1]
    expected_all = [expected, *torch.autograd.grad(expected, exact, outer.double())]
    for ours, theirs in zip([made, *torch.autograd.grad(made, inputs, outer)], expected_all, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=3e-6, atol=1e-6)


def test_inputs_are_not_changed() -> None:
    gate, up, outer = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).unbind()
    before = [tensor.clone() for tensor in (gate, up, outer)]
    made = _Swiglu.apply(gate.requires_grad_(), up.requires_grad_())
    made.backward(outer)
    assert all(torch.equal(*pair) for pair in zip(before, (gate, up, outer), strict=True))


def test_another_activation_is_left_to_the_module() -> None:
    assert SwigluForward.fits(mlp_of())
    assert not SwigluForward.fits(mlp_of("gelu"))


def test_a_trunk_uses_it_in_every_layer(tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    trunk = make_trunk(base, PolicySettings(rank=4), ("policy",))
    parts = [m for m in trunk.modules() if isinstance(m, LlamaMLP)]
    assert len(parts) == 2
    assert all(isinstance(vars(m)["forward"], SwigluForward) for m in parts)
