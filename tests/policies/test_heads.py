import pytest
import torch

from policies.heads import LinearHead, ScalarHead


@pytest.mark.parametrize("width", [64, 4096])
def test_weights_start_with_a_std_of_one_over_root_of_width_plus_one(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.cat([ScalarHead(width, generator).weight.detach() for _ in range(200_000 // width)])
    assert float(weights.std()) == pytest.approx((width + 1) ** -0.5, rel=0.01)
    assert float(weights.mean()) == pytest.approx(0.0, abs=0.01 * (width + 1) ** -0.5)


def test_bias_starts_at_zero() -> None:
    assert ScalarHead(8).bias.tolist() == [0.0]


def test_same_generator_same_head() -> None:
    one = ScalarHead(8, torch.Generator().manual_seed(3)).weight
    other = ScalarHead(8, torch.Generator().manual_seed(3)).weight
    assert torch.equal(one, other)


def test_head_is_linear_in_float32_whatever_the_dtype_of_the_states() -> None:
    head = ScalarHead(8)
    hidden = torch.randn(2, 3, 8)
    assert head(hidden).shape == (2, 3)
    torch.testing.assert_close(head(hidden), (hidden * head.weight).sum(-1) + head.bias)
    assert head(hidden.bfloat16()).dtype == torch.float32


def test_a_head_of_zeros_scores_zero_and_can_learn() -> None:
    head = ScalarHead.zeros(8)
    scores = head(torch.randn(4, 8))
    assert scores.tolist() == [0.0] * 4
    scores.sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().sum() > 0


def test_a_folded_head_returns_the_normalised_score() -> None:
    head = ScalarHead(8)
    head.bias.data.fill_(0.7)
    hidden = torch.randn(5, 8)
    expected = (head(hidden).detach() - 3.0) / 2.5
    head.fold(mean=3.0, std=2.5)
    torch.testing.assert_close(head(hidden), expected)


def test_folding_normalises_the_scores_that_it_was_measured_on() -> None:
    head = ScalarHead(8)
    hidden = torch.randn(500, 8)
    scores = head(hidden).detach()
    head.fold(float(scores.mean()), float(scores.std()))
    assert float(head(hidden).mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(head(hidden).std()) == pytest.approx(1.0, rel=1e-5)


def test_a_linear_head_is_one_product_without_a_bias() -> None:
    head = LinearHead(8, 3, torch.Generator().manual_seed(3))
    hidden = torch.randn(2, 5, 8)
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    torch.testing.assert_close(head(hidden), torch.einsum("bth,ch->btc", hidden, head.weight))
    assert head(hidden.bfloat16()).dtype == torch.float32
    assert torch.equal(head.weight, LinearHead(8, 3, torch.Generator().manual_seed(3)).weight)
