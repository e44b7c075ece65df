import pytest

from align.jobs.client import ADDRESS_VARIABLE, Jobs
from policies.errors import UserError


def test_a_given_address_precedes_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADDRESS_VARIABLE, "http://127.0.0.1:2")
    with pytest.raises(UserError, match=r"^--address http://127\.0\.0\.1:1: .*127\.0\.0\.1:1\b"):
        Jobs("http://127.0.0.1:1")
