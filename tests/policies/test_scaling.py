"""Policies on the line through the reference and the policy."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from policies.batching import collate
from policies.build import build_trunk
from policies.errors import UserError
from policies.method_spec import methods
from policies.scaling import scale_adapter, widened, with_rank
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights

METHODS = {
    "lora": PolicySettings(rank=3, alpha=7),
    "rslora": PolicySettings(rank=3, alpha=7, rslora=True),
    "pissa": PolicySettings(rank=3, alpha=7, init="pissa"),
    "qlora": PolicySettings(method="qlora", rank=3, alpha=7),
    "bitfit": PolicySettings(method="bitfit"),
    "ia3": PolicySettings(method="ia3"),
    "layer_norm": PolicySettings(method="layer_norm"),
    "top_layers": PolicySettings(method="top_layers"),
    "full": PolicySettings(method="full"),
}


def random_adapter(model: Path, settings: PolicySettings, seed: int) -> AdapterWeights:
    trunk = build_trunk(ModelSettings(path=str(model), dtype="float32"), settings, ("policy",))
    generator = torch.Generator().manual_seed(seed)
    return {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in trunk.read_adapter("policy").items()}


def merged(model: Path, settings: PolicySettings, weights: AdapterWeights) -> dict[str, Tensor]:
    """All weights of the model with the adapter merged into them, in float64."""
    trunk = build_trunk(ModelSettings(path=str(model), dtype="float32"), settings, ("policy",))
    trunk.write_adapter("policy", weights)
    return {name: weight.double() for name, weight in trunk.merged_weights("policy").items()}


@pytest.mark.parametrize("scale", [-0.5, 0.3, 1.7])
@pytest.mark.parametrize("method", METHODS)
def test_the_weights_of_the_model_lie_on_the_line(method: str, scale: float, tiny_model: Path) -> None:
    settings = METHODS[method]
    reference, policy = (random_adapter(tiny_model, settings, seed) for seed in (1, 2))
    scaled = scale_adapter(settings, reference, policy, scale)
    start, end = (merged(tiny_model, settings, weights) for weights in (reference, policy))
    found = merged(tiny_model, scaled.settings, scaled.weights)
    assert found.keys() == start.keys()
    assert any((end[name] - start[name]).abs().max() > 0.01 for name in found)
    for name, weight in found.items():
        expected = start[name] + scale * (end[name] - start[name])
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_0_is_the_reference_and_1_the_policy_to_the_bit(method: str, tiny_model: Path) -> None:
    settings = METHODS[method]
    reference, policy = (random_adapter(tiny_model, settings, seed) for seed in (1, 2))
    for scale, expected in ((0.0, reference), (1.0, policy)):
        scaled = scale_adapter(settings, reference, policy, scale)
        assert scaled.settings == settings
        assert all(torch.equal(scaled.weights[name], weight) for name, weight in expected.items())


def test_a_reference_that_adds_nothing_leaves_the_rank(tiny_model: Path) -> None:
    settings = METHODS["lora"]
    policy = random_adapter(tiny_model, settings, 2)
    reference = {name: torch.zeros_like(w) if "lora_B" in name else w for name, w in policy.items()}
    scaled = scale_adapter(settings, reference, policy, 0.5)
    assert scaled.settings == settings
    assert all(torch.equal(w, policy[name] * (0.5 if "lora_B" in name else 1)) for name, w in scaled.weights.items())


@given(
    rank=st.integers(1, 64),
    alpha=st.floats(0.1, 100),
    rslora=st.booleans(),
    new_rank=st.integers(1, 200),
)
def test_another_rank_keeps_the_factor(rank: int, alpha: float, rslora: bool, new_rank: int) -> None:
    def factor(settings: PolicySettings) -> float:
        return settings.full_alpha / settings.full_rank ** (0.5 if rslora else 1)

    settings = PolicySettings(rank=rank, alpha=alpha, rslora=rslora)
    assert factor(with_rank(settings, new_rank)) == pytest.approx(factor(settings), rel=1e-12)


@pytest.mark.parametrize("method", ["lora", "rslora", "full"])
def test_a_wider_adapter_computes_the_same(method: str, tiny_model: Path) -> None:
    settings = METHODS[method]
    weights = random_adapter(tiny_model, settings, 1)
    wider = with_rank(settings, 8) if settings.spec.is_low_rank else settings

    def states(settings: PolicySettings, weights: AdapterWeights) -> Tensor:
        trunk = build_trunk(ModelSettings(path=str(tiny_model), dtype="float32"), settings, ("policy",))
        trunk.write_adapter("policy", weights)
        batch = collate([[5, 6, 7]], [[8, 9]])
        with torch.no_grad():
            return trunk.hidden_packed(batch.ids, batch.lengths, "policy")

    torch.testing.assert_close(states(wider, widened(weights, wider)), states(settings, weights), rtol=1e-5, atol=1e-5)


def test_methods_without_policies_in_between_are_refused(tiny_model: Path) -> None:
    assert {name for name, spec in methods().items() if spec.scales.supported} == {
        settings.method for settings in METHODS.values()
    }
    for settings in (PolicySettings(dora=True), PolicySettings(method="bottleneck")):
        with pytest.raises(UserError, match=r"no policies in between.*lora without dora"):
            scale_adapter(settings, {}, {}, 0.5)
