"""PHM layers against sums of Kronecker products in float64."""

import torch
from torch import nn

from policies.layers.phm import PhmLinear, phm_weight
from tests.policies.gradients import gradient


def test_the_weight_is_a_sum_of_kronecker_products() -> None:
    generator = torch.Generator().manual_seed(0)
    slow = torch.randn(3, 3, 3, generator=generator, dtype=torch.float64)
    left = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    right = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    expected = sum(torch.kron(slow[i], left[i] @ right[i]) for i in range(3))
    torch.testing.assert_close(phm_weight(slow, left, right), expected)


def test_layers_share_the_slow_weights_and_start_with_glorot_variance() -> None:
    torch.manual_seed(0)
    slow = nn.Parameter(torch.randn(4, 4, 4) / 2)
    layers = [PhmLinear(256, 128, slow, rank=2) for _ in range(20)]
    assert all(layer._slow[0] is slow for layer in layers)
    assert {name for name, _ in layers[0].named_parameters()} == {"left", "right", "bias"}
    weights = torch.stack([phm_weight(slow, layer.left, layer.right) for layer in layers])
    assert 0.5 < float(weights.detach().var()) / (2 / (256 + 128)) < 2
    layers[0](torch.ones(256)).square().sum().backward()
    by_one = gradient(slow).clone()
    layers[1](torch.ones(256)).square().sum().backward()
    assert not torch.allclose(gradient(slow), by_one)
