import pytest

from align.runtime.wording import counted


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 epochs"), (1, "1 epoch"), (1.0, "1 epoch"), (0.5, "0.5 epochs"), (1200, "1,200 epochs")]
)
def test_the_noun_has_the_number_of_its_count(count: float, text: str) -> None:
    assert counted(count, "epoch") == text


def test_an_irregular_plural_is_given() -> None:
    assert counted(2, "batch", "batches") == "2 batches"
    assert counted(1, "batch", "batches") == "1 batch"
