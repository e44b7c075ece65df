import gc

import pytest

from align.runtime.garbage import no_collections


def test_the_collector_pauses_and_goes_on_even_after_an_error() -> None:
    @no_collections()
    def fail() -> None:
        raise ValueError(gc.isenabled())

    with pytest.raises(ValueError, match="False"):
        fail()
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    try:
        with no_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
