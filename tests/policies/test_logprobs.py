import pytest
import torch
from torch import Tensor

from policies.logprobs import CHUNK, _from_logits, smoothed_logprobs, token_logprobs, token_logprobs_and_entropy
from tests.policies.gradients import gradient


def oracle(hidden: Tensor, tokens: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Token by token."""
    logprobs, entropies = [], []
    for state, token in zip(hidden, tokens):
        scaled = (weight @ state) / temperature
        row = scaled - torch.logsumexp(scaled, 0)
        logprobs.append(row[token])
        entropies.append(-(row.exp() * row).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def inputs(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(count, 8, generator=generator)
    return hidden, torch.randint(13, (count,), generator=generator), torch.randn(13, 8, generator=generator)


@pytest.mark.parametrize("count", [1, 5, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("learn_entropy", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_chunks_give_the_values_and_gradients_of_all_positions_at_once(
    count: int, temperature: float, learn_entropy: bool, trained: bool
) -> None:
    hidden, tokens, weight = inputs(count)
    fast, slow = hidden.clone().requires_grad_(True), hidden.double().requires_grad_(True)
    precise = weight.double().requires_grad_(trained)
    weight.requires_grad_(trained)
    logprobs, entropy = token_logprobs_and_entropy(fast, tokens, lambda h: h @ weight.T, temperature, learn_entropy)
    expected, expected_entropy = oracle(slow, tokens, precise, temperature)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-5)

    weights = torch.linspace(-1, 1, count)
    bonus = 0.3 * learn_entropy
    (logprobs * weights + bonus * entropy).sum().backward()
    (expected * weights.double() + bonus * expected_entropy).sum().backward()
    torch.testing.assert_close(gradient(fast).double(), slow.grad, rtol=1e-4, atol=1e-5)
    if trained:
        torch.testing.assert_close(gradient(weight).double(), precise.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("trained", "times"), [(False, 1), (True, 2)])
def test_a_frozen_head_makes_logits_once(trained: bool, times: int) -> None:
    hidden, tokens, weight = inputs(CHUNK + 3)
    weight.requires_grad_(trained)
    made = []

    def head(states: Tensor) -> Tensor:
        made.append(len(states))
        return states @ weight.T

    token_logprobs(hidden.requires_grad_(True), tokens, head, 1.0).sum().backward()
    assert sum(made) == times * len(hidden)


def test_chunks_without_gradients_are_the_same() -> None:
    hidden, tokens, weight = inputs(CHUNK + 9)
    with torch.no_grad():
        quick = token_logprobs(hidden, tokens, lambda h: h @ weight.T, 1.0)
    slow = token_logprobs(hidden.requires_grad_(True), tokens, lambda h: h @ weight.T, 1.0)
    both, entropy = token_logprobs_and_entropy(hidden, tokens, lambda h: h @ weight.T, 1.0, False)
    assert torch.equal(quick, slow.detach())
    assert torch.equal(quick, both.detach())
    assert not entropy.requires_grad


def test_no_more_than_a_chunk_of_logits_exists_at_one_time() -> None:
    hidden, tokens, weight = inputs(3 * CHUNK)
    sizes = []

    def head(states: Tensor) -> Tensor:
        sizes.append(len(states))
        return states @ weight.T

    token_logprobs(hidden, tokens, head, 1.0)
    assert max(sizes) == CHUNK


def test_half_precision_logits_are_normalised_in_float32() -> None:
    hidden, tokens, weight = inputs(50)
    logits = (hidden @ weight.T).bfloat16()
    logprobs, entropy = token_logprobs_and_entropy(hidden, tokens, lambda _: logits, 1.0, False)
    assert logprobs.dtype == entropy.dtype == torch.float32
    expected = torch.log_softmax(logits.float(), -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logprobs, expected)


def test_entropy_of_equal_logits_is_the_log_of_the_vocabulary_size() -> None:
    tokens = torch.zeros(1, dtype=torch.long)
    _, entropy = token_logprobs_and_entropy(torch.zeros(1, 8), tokens, lambda h: h.new_zeros(1, 13), 0.5, False)
    assert float(entropy) == pytest.approx(torch.log(torch.tensor(13.0)).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 13, 16, 4097])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_kernel_agrees_with_float64(dtype: torch.dtype, vocabulary: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (10 * torch.randn(40, vocabulary, generator=generator)).to(dtype)
    tokens = torch.randint(vocabulary, (40,), generator=generator)
    logits[torch.arange(20), (tokens[:20] + 1) % vocabulary] = -torch.inf if vocabulary > 1 else 0.0
    logprobs, entropy, logits_gradient = _from_logits(logits, tokens, temperature, with_gradient=True)
    whole = torch.log_softmax(logits.double() / temperature, -1)
    expected = whole.gather(-1, tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(whole.exp() * whole).nan_to_num().sum(-1), rtol=1e-5, atol=1e-5)
    weights = whole.exp()
    weights[torch.arange(40), tokens] -= 1
    assert logits_gradient is not None
    assert logits_gradient.dtype == dtype
    torch.testing.assert_close(
        logits_gradient.double(), weights, rtol=1e-5 if dtype == torch.float32 else 4e-3, atol=1e-6
    )


def test_a_nan_stays_in_its_row() -> None:
    logits = torch.zeros(3, 20)
    logits[1, 7], logits[2, 3] = torch.nan, torch.inf
    logprobs, entropy, _ = _from_logits(logits, torch.zeros(3, dtype=torch.long), 1.0, with_gradient=False)
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("token", [-1, 13])
def test_a_token_beyond_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(IndexError, match="13"):
        token_logprobs(torch.zeros(2, 8), torch.tensor([0, token]), lambda h: h.new_zeros(2, 13), 1.0)


@pytest.mark.parametrize("count", [1, CHUNK + 7])
@pytest.mark.parametrize("trained", [True, False])
def test_smoothed_log_probabilities_are_those_of_a_mixture_of_labels(count: int, trained: bool) -> None:
    hidden, tokens, weight = inputs(count)
    fast, slow = hidden.clone().requires_grad_(True), hidden.double().requires_grad_(True)
    precise = weight.double().requires_grad_(trained)
    weight.requires_grad_(trained)
    smoothed = smoothed_logprobs(fast, tokens, lambda h: h @ weight.T, 0.2)
    expected = []
    for state, token in zip(slow, tokens, strict=True):
        logprobs = (precise @ state).log_softmax(0)
        expected.append(0.8 * logprobs[token] + 0.2 / len(logprobs) * logprobs.sum())
    torch.testing.assert_close(smoothed.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
    smoothed.sum().backward()
    torch.stack(expected).sum().backward()
    torch.testing.assert_close(gradient(fast).double(), slow.grad, rtol=1e-4, atol=1e-5)
    if trained:
        torch.testing.assert_close(gradient(weight).double(), precise.grad, rtol=1e-4, atol=1e-3)
