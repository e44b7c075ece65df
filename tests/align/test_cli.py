"""What the command sets before it does anything."""

import os
import sys

import pytest

from align.cli import main

NAME = "THP_MEM_ALLOC_ENABLE"


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_large_pages_are_asked_for_unless_the_user_has_said(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, given or "")
    if given is None:
        monkeypatch.delenv(NAME)
    monkeypatch.setattr(sys, "argv", ["align", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ[NAME] == expected
