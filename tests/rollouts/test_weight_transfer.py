import pytest
import torch

from rollouts import weight_transfer
from rollouts.weight_transfer import bundle_names, pack, unpack

WEIGHTS = {
    "a": torch.randn(3, 5),
    "b": torch.arange(7, dtype=torch.int8),
    "c": torch.randn(2, 2, 2).to(torch.bfloat16),
    "d": torch.tensor(2.5),
    "e": torch.randn(4, 6).T,
}


def test_unpacking_restores_what_was_packed() -> None:
    unpacked = unpack([pack(WEIGHTS, ["a", "b"]), pack(WEIGHTS, ["c", "d", "e"])])
    assert list(unpacked) == list(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        assert unpacked[name].dtype == tensor.dtype
        assert torch.equal(unpacked[name], tensor)


def test_bundles_are_filled_up_to_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_transfer, "MAX_BUNDLE_BYTES", 70)
    assert list(bundle_names(WEIGHTS)) == [["a", "b"], ["c", "d"], ["e"]]
    monkeypatch.setattr(weight_transfer, "MAX_BUNDLE_BYTES", 1)
    assert list(bundle_names(WEIGHTS)) == [[name] for name in WEIGHTS]
