from collections.abc import Iterator

import pytest
import torch

from policies.device import ComputeSettings


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    ComputeSettings(threads, deterministic).apply()


def put() -> torch.Tensor:
    """What torch has no deterministic way to do: the last of two writers to one place wins."""
    return torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_what_may_differ_from_run_to_run_is_refused() -> None:
    ComputeSettings(1, deterministic=True).apply()
    with pytest.raises(RuntimeError, match="deterministic"):
        put()
    ComputeSettings(1, deterministic=False).apply()
    assert float(put()[0]) in (1.0, 2.0)


def test_threads_are_set() -> None:
    for threads in (2, 1):
        ComputeSettings(threads).apply()
        assert torch.get_num_threads() == threads
