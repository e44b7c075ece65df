"""The documentation lists the checks as they are."""

from align.data.quality.catalogue import CHECKS, checks_table
from tests.documents import ROOT


def test_the_table_in_the_documentation_is_current() -> None:
    assert checks_table() in (ROOT / "docs" / "data-check.md").read_text(encoding="utf-8"), (
        "write the output of `python -m align.data.quality.catalogue` into docs/data-check.md"
    )


def test_each_check_has_a_name_of_its_own() -> None:
    assert len({check.kind for check in CHECKS}) == len(CHECKS) == 16
