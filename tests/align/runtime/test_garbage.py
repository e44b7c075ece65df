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


def test_what_was_made_meanwhile_is_not_what_the_next_collection_begins_with() -> None:
    gc.disable()
    try:
        with no_collections():
            made: list[list[int]] = [[] for _ in range(10_000)]
        young = {id(thing) for thing in gc.get_objects(generation=0)}
    finally:
        gc.enable()
    assert not young & {id(thing) for thing in made}
