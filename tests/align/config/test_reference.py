"""The page of all settings follows from the schema."""

import pytest

from align.config.reference import reference
from rewards.terms.registry import TERMS
from tests.documents import ROOT, setting_names


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert page == reference(), "run `python -m align.config.reference > docs/reference.md`"


def test_the_page_has_every_setting() -> None:
    page = reference()
    for name in setting_names():
        assert f"| `{name}` |" in page


@pytest.mark.parametrize("kind", TERMS)
def test_every_kind_of_reward_term_has_a_section(kind: str) -> None:
    assert f"## `reward.terms.NAME: {{kind: {kind}}}`" in reference()


@pytest.mark.parametrize(
    "row",
    [
        "| `seed` | integer ≥ 0 | `0` |",
        "| `heldout_share` | number > 0, < 1 | `0.1` |",
        "| `targets` | text or list of text | unset |",
        "| `where` | `reward`, `loss` | unset |",
        "| `path` | text or list of text | required |",
        "| `attributes` | NAME: number | `{}` |",
    ],
)
def test_a_row_has_type_and_default(row: str) -> None:
    assert row in reference()
