import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from align.runtime.seeds import permutation, seed_for

PURPOSES = st.lists(st.one_of(st.text(max_size=5), st.integers(0, 99)), max_size=4)


@given(st.integers(0, 2**31), PURPOSES)
def test_a_seed_fits_torch(seed: int, purpose: list[str | int]) -> None:
    assert 0 <= seed_for(seed, *purpose) < 2**63


def test_a_seed_is_the_same_in_every_process() -> None:
    code = "from align.runtime.seeds import seed_for; print(seed_for(7, 'rollout', 3, 5))"
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(other.stdout) == seed_for(7, "rollout", 3, 5)


@given(st.integers(0, 3), PURPOSES, st.integers(0, 3), PURPOSES)
def test_another_purpose_gives_another_seed(a: int, purpose: list[str | int], b: int, other: list[str | int]) -> None:
    assert (seed_for(a, *purpose) == seed_for(b, *other)) == ((a, purpose) == (b, other))


def test_names_are_not_concatenated() -> None:
    assert len({seed_for(0, "a", "b"), seed_for(0, "ab"), seed_for(0, "a", 1), seed_for(0, "a", "1")}) == 4


@given(st.integers(0, 200), st.integers(0, 99))
def test_a_permutation_has_each_index_once(count: int, seed: int) -> None:
    assert sorted(permutation(count, seed, "order")) == list(range(count))


def test_a_permutation_depends_on_its_purpose_alone() -> None:
    first = permutation(50, 0, "order", 1)
    assert permutation(50, 0, "order", 1) == first
    assert permutation(50, 0, "order", 2) != first
