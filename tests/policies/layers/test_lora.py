"""Our forward and backward pass of LoRA against PEFT's."""

import copy
from pathlib import Path

import pytest
import torch
from peft.tuners import lora
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from policies.build import make_trunk
from policies.layers.lora import LoraForward, _LoraLinear
from policies.schema import PolicySettings
from policies.trunk import Trunk
from tests.policies.gradients import flat_gradients, gradient

ROLES = ("policy", "critic")
IDS = torch.arange(40).reshape(2, 20) + 5


def make(folder: Path, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Trunk:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    trunk = make_trunk(base, PolicySettings(rank=4, alpha=8.0, dropout=dropout), ROLES)
    for seed, role in enumerate(ROLES):
        generator = torch.Generator().manual_seed(seed)
        own = trunk.adapter(role)
        trunk.write_adapter(role, {n: 0.15 * torch.randn(p.shape, generator=generator) for n, p in own.items()})
    return trunk


def gradients(trunk: Trunk) -> tuple[Tensor, Tensor]:
    """Hidden states, and the gradient of a function of them, for the policy."""
    trunk.train_only("policy")
    states = trunk.hidden(IDS, "policy")
    states.float().sin().sum().backward()
    return states.detach(), flat_gradients(trunk.adapter("policy").values())


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_and_gradients_are_as_near_to_float64_as_those_of_peft(tiny_model: Path, dtype: torch.dtype) -> None:
    ours, theirs, exact = make(tiny_model, dtype), make(tiny_model, dtype), make(tiny_model)
    theirs.use_module_forwards()
    replaced = sum(isinstance(vars(module).get("forward"), LoraForward) for module in ours.modules())
    assert replaced == 14  # the seven linear layers of two blocks
    exact.use_module_forwards()
    for value, peft, expected in zip(gradients(ours), gradients(theirs), gradients(exact.double())):
        assert distance(value, expected) < 1.5 * distance(peft, expected) + 1e-6


def test_parameters_keep_their_dtype_and_so_do_their_gradients(tiny_model: Path) -> None:
    trunk = make(tiny_model, torch.bfloat16)
    gradients(trunk)
    assert {p.dtype for p in trunk.adapter("policy").values()} == {torch.float32}
    assert {gradient(p).dtype for p in trunk.adapter("policy").values()} == {torch.float32}
    assert all(p.grad is None for n, p in trunk.named_parameters() if ".policy." not in n)


@pytest.mark.parametrize("into_weights", [False, True])
def test_finite_differences_agree(into_weights: bool) -> None:
    """Two layers with the same input, one of them with a bias, and adapters of different ranks."""
    generator = torch.Generator().manual_seed(0)
    x, bias, *weights = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, 5), (4,), (4, 5), (6, 5), (2, 5), (4, 2), (3, 5), (6, 3))
    )
    given = [tensor.requires_grad_() for tensor in (x, *weights[2:])]
    bases = [(weights[0], bias), (weights[1], None)]

    def both(x: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
        return _LoraLinear.apply(x, bases, 1.3, into_weights, *adapters)

    assert torch.autograd.gradcheck(both, given)
    out = both(*given)[1]
    expected = x @ (weights[1] + 1.3 * given[4] @ given[3]).T
    torch.testing.assert_close(out, expected)


def test_layers_with_the_same_input_are_computed_together_and_only_then(tiny_model: Path) -> None:
    trunk = make(tiny_model)
    layer = trunk.causal.base_model.layers[0].self_attn
    query, key, value = (part.forward for part in (layer.q_proj, layer.k_proj, layer.v_proj))
    assert query.later_siblings == [key, value]
    assert not key.later_siblings
    assert not value.later_siblings
    x, other = torch.randn(2, 3, trunk.width), torch.randn(2, 3, trunk.width)
    trunk.switch("policy")
    alone = key(x)
    query(x)
    torch.testing.assert_close(key(x), alone)
    query(x)
    torch.testing.assert_close(key(other), lora.Linear.forward(layer.k_proj, other))
    query(x)
    trunk.switch("critic")
    torch.testing.assert_close(value(x), lora.Linear.forward(layer.v_proj, x))


def test_forward_passes_with_and_without_gradients_give_the_same_states(tiny_model: Path) -> None:
    """Few tokens or many; the adapter is added to the output in one case, to the weight in the others."""
    trunk = make(tiny_model)
    trunk.train_only("policy")
    for repeats in (1, 8):
        ids = IDS.repeat(repeats, 1)
        trained = trunk.hidden(ids, "policy")
        assert trained.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(trained, trunk.hidden(ids, "policy"), rtol=1e-4, atol=1e-5)


def test_dropout_is_left_to_peft(tiny_model: Path) -> None:
    trunk = make(tiny_model, dropout=0.5)
    calm = trunk.hidden(IDS, "policy")
    assert torch.equal(calm, trunk.hidden(IDS, "policy"))
    trunk.train()
    torch.manual_seed(0)
    assert not torch.equal(trunk.hidden(IDS, "policy"), trunk.hidden(IDS, "policy"))


def test_merged_weights_give_the_same_states_and_follow_the_adapter_when_merged_again(tiny_model: Path) -> None:
    trunk = make(tiny_model)
    before = {role: trunk.hidden(IDS, role) for role in ROLES}
    base = copy.deepcopy(trunk.causal.base_model.layers[0].self_attn.q_proj.base_layer.weight)
    trunk.merge("policy")
    torch.testing.assert_close(trunk.hidden(IDS, "policy"), before["policy"], rtol=1e-4, atol=1e-5)
    assert torch.equal(trunk.hidden(IDS, "critic"), before["critic"])
    assert torch.equal(trunk.causal.base_model.layers[0].self_attn.q_proj.base_layer.weight, base)
    trunk.write_adapter("policy", trunk.read_adapter("critic"))
    trunk.merge("policy")
    torch.testing.assert_close(trunk.hidden(IDS, "policy"), before["critic"], rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_not_linear_is_left_to_peft() -> None:
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    trunk = make_trunk(GPT2LMHeadModel(config), PolicySettings(rank=4), ROLES)
    assert not any("forward" in vars(module) for module in trunk.modules())
