"""What the command sets up before it does anything."""

import os
import sys

import pytest

from align.cli import main

NAME = "THP_MEM_ALLOC_ENABLE"


@pytest.mark.parametrize(("preset", "expected"), [(None, "1"), ("0", "0")])
def test_large_pages_are_requested_unless_the_user_has_set_the_variable(
    preset: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, preset or "")
    if preset is None:
        monkeypatch.delenv(NAME)
    monkeypatch.setattr(sys, "argv", ["align", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ[NAME] == expected
