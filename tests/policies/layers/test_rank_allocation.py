"""AdaLoRA's allocation of ranks, against PEFT's own allocator and against loops in float64."""

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from policies.layers.rank_allocation import SMOOTHING, RankAllocator, Triplets, budget, orthogonality


def random_layers(generator: torch.Generator) -> list[Triplets]:
    """Two layers of rank 3, from 5 to 4 and from 4 to 6 features."""
    layers: list[Triplets] = []
    for out, inputs in ((4, 5), (6, 4)):
        shapes = (out, 3), (3, 1), (3, inputs)
        layers.append(Triplets(*(nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes)))
    return layers


def set_random_gradients(layers: list[Triplets], generator: torch.Generator) -> None:
    for layer in layers:
        for tensor in layer.tensors:
            tensor.grad = torch.randn(tensor.shape, generator=generator)


def expected_scores(histories: list[list[tuple[Tensor, Tensor]]]) -> list[list[float]]:
    """The importance of each triplet of each layer, number by number.

    histories: Per layer, P, Λ and Q in turn: weights and gradients `[steps, …]`.
    """

    def smoothed(weight: Tensor, gradients: Tensor) -> Tensor:
        scores = torch.zeros(weight.shape, dtype=torch.float64)
        for index in torch.cartesian_prod(*(torch.arange(size) for size in weight.shape)).tolist():
            sensitivity = uncertainty = 0.0
            for gradient in gradients:
                importance = abs(float(weight[tuple(index)]) * float(gradient[tuple(index)]))
                sensitivity = SMOOTHING * sensitivity + (1 - SMOOTHING) * importance
                uncertainty = SMOOTHING * uncertainty + (1 - SMOOTHING) * abs(importance - sensitivity)
            scores[tuple(index)] = sensitivity * uncertainty
        return scores

    totals: list[list[float]] = []
    for left, values, right in histories:
        p, e, q = smoothed(*left), smoothed(*values), smoothed(*right)
        totals.append([float(e[i, 0] + p[:, i].mean() + q[i].mean()) for i in range(len(e))])
    return totals


def test_the_most_important_triplets_of_all_layers_are_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = random_layers(generator)
    allocator = RankAllocator(layers)
    gradients: list[list[list[Tensor]]] = [[[], [], []] for _ in layers]
    for _ in range(4):
        set_random_gradients(layers, generator)
        allocator.observe()
        for layer, seen in zip(layers, gradients, strict=True):
            for tensor, past in zip(layer.tensors, seen, strict=True):
                assert tensor.grad is not None
                past.append(tensor.grad.clone())
    histories = []
    for layer, seen in zip(layers, gradients, strict=True):
        pairs = zip(layer.tensors, seen, strict=True)
        histories.append([(tensor.detach().clone(), torch.stack(past)) for tensor, past in pairs])
    scores = expected_scores(histories)
    for number, expected in enumerate(scores):
        torch.testing.assert_close(allocator.scores(number), torch.tensor(expected))
    threshold = sorted([*scores[0], *scores[1]], reverse=True)[1]
    allocator.keep(2)
    kept = [[bool(value != 0) for value in layer.values] for layer in layers]
    assert kept == [[score >= threshold for score in layer_scores] for layer_scores in scores]


def test_the_scores_are_those_of_peft() -> None:
    torch.manual_seed(0)
    config: Any = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["0", "1"])
    model: Any = get_peft_model(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), config)
    by_peft = model.base_model.rankallocator
    peft_layers = [model.base_model.model[index] for index in range(2)]
    layers = [Triplets(m.lora_B["default"], m.lora_E["default"], m.lora_A["default"]) for m in peft_layers]
    for layer in layers:
        nn.init.normal_(layer.values)
    allocator = RankAllocator(layers)
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(7, 6)).square().sum().backward()
        allocator.observe()
        by_peft.update_ipt(model)
    values = [layer.values.detach().clone() for layer in layers]
    allocator.keep(5)
    kept = [layer.values.detach().clone() for layer in layers]
    for layer, value in zip(layers, values, strict=True):
        layer.values.data.copy_(value)
    by_peft.mask_to_budget(model, 5)
    assert all(torch.equal(layer.values, value) for layer, value in zip(layers, kept, strict=True))
    assert sum(int((value != 0).sum()) for value in kept) == 5


@pytest.mark.parametrize(("progress", "expected"), [(0.05, 48), (0.1, 48), (0.3, 34), (0.49, 32), (0.5, 32), (1.0, 32)])
def test_the_budget_falls_by_a_cubic_schedule(progress: float, expected: int) -> None:
    assert budget(progress, start=0.1, end=0.5, initial=48, target=32) == expected


def test_the_penalty_is_zero_for_orthogonal_vectors_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = random_layers(generator)
    expected = 0.0
    for layer in layers:
        for gram in (layer.left.T @ layer.left, layer.right @ layer.right.T):
            expected += float((gram.detach().double() - torch.eye(3)).square().sum().sqrt()) / 4
    assert float(orthogonality(layers)) == pytest.approx(expected, rel=1e-5)
    for layer in layers:
        nn.init.orthogonal_(layer.left)
        nn.init.orthogonal_(layer.right)
    assert float(orthogonality(layers)) == pytest.approx(0, abs=1e-5)


def test_a_gradient_that_is_not_finite_is_not_observed() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = random_layers(generator)
    allocator = RankAllocator(layers)
    set_random_gradients(layers, generator)
    gradient = layers[1].right.grad
    assert gradient is not None
    gradient[0, 0] = torch.inf
    allocator.observe()
    assert all(not buffer.any() for buffer in allocator.buffers())
