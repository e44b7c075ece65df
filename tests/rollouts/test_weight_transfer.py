import pytest
import torch

from rollouts import weight_transfer as bundles
from rollouts.weight_transfer import groups, pack, unpack

WEIGHTS = {
    "a": torch.randn(3, 5),
    "b": torch.arange(7, dtype=torch.int8),
    "c": torch.randn(2, 2, 2).to(torch.bfloat16),
    "d": torch.tensor(2.5),
    "e": torch.randn(4, 6).T,
}


def test_what_is_packed_comes_out_as_it_was() -> None:
    out = unpack([pack(WEIGHTS, ["a", "b"]), pack(WEIGHTS, ["c", "d", "e"])])
    assert list(out) == list(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        assert out[name].dtype == tensor.dtype
        assert torch.equal(out[name], tensor)


def test_parcels_are_filled_up_to_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "LARGEST", 70)
    assert list(groups(WEIGHTS)) == [["a", "b"], ["c", "d"], ["e"]]
    monkeypatch.setattr(bundles, "LARGEST", 1)
    assert list(groups(WEIGHTS)) == [[name] for name in WEIGHTS]
