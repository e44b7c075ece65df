from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from policies.build import build_trunk
from policies.layers.embedding_noise import lengths_by_token, noisy_embeddings
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import Trunk

WIDTH = 50
ALPHA = 5.0
LENGTHS = (3, 40, 11)


@pytest.fixture(scope="module")
def trunk(tiny_model: Path) -> Trunk:
    return build_trunk(ModelSettings(path=str(tiny_model)), PolicySettings(rank=2), ("policy",))


def test_noise_is_uniform_within_the_bounds_of_each_sequence() -> None:
    embeddings = nn.Embedding(10, WIDTH)
    ids = torch.zeros(1, 400, dtype=torch.long)
    lengths = torch.full((1, 400), 100)
    lengths[0, :16] = 16
    with noisy_embeddings(embeddings, lambda: lengths, ALPHA):
        noise = (embeddings(ids) - embeddings.weight[0]).detach()
    assert embeddings(ids).equal(embeddings.weight[0].expand(1, 400, WIDTH))
    for part, length in ((noise[0, :16], 16), (noise[0, 16:], 100)):
        bound = ALPHA / (length * WIDTH) ** 0.5
        assert 0.97 * bound < part.abs().max() <= bound
        assert part.std() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert abs(part.mean()) < 0.1 * bound


def test_each_token_of_packed_sequences_has_its_length() -> None:
    assert lengths_by_token((2, 3), torch.device("cpu")).tolist() == [[2, 2, 3, 3, 3]]


def captured_bounds(trunk: Trunk, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The largest noise of each token, `[N]`, in the order of the sequences: all noise is at its bound."""
    monkeypatch.setattr(Tensor, "uniform_", lambda tensor, low, high: tensor.fill_(high))
    seen: list[Tensor] = []
    handle = trunk.causal.base_model.layers[0].register_forward_pre_hook(
        lambda layer, arguments: seen.append(arguments[0].detach().clone())
    )
    ids = torch.arange(sum(LENGTHS)) + 5
    try:
        trunk.hidden_packed(ids, LENGTHS, "policy", noise=ALPHA)
        trunk.hidden_packed(ids, LENGTHS, "policy")
    finally:
        handle.remove()
    difference = (seen[0] - seen[1]).amax(-1)  # [1, N] or [B, T]
    return difference


def test_packed_and_padded_sequences_have_the_noise_of_their_lengths(
    trunk: Trunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bound(length: int) -> float:
        return float(ALPHA / (length * trunk.width) ** 0.5)

    packed = captured_bounds(trunk, monkeypatch)[0]
    by_length = [bound(length) for length in sorted(LENGTHS) for _ in range(length)]
    assert packed[: len(by_length)].tolist() == pytest.approx(by_length, rel=1e-3)
    monkeypatch.setattr(trunk, "supports_packing", False)
    padded = captured_bounds(trunk, monkeypatch)
    for row, length in zip(padded, LENGTHS, strict=True):
        assert row[:length].tolist() == pytest.approx([bound(length)] * length, rel=1e-3)
