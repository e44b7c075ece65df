"""Ends of texts that are complete, and ends that show a cut."""

import pytest

from align.data.quality.last_words import LastWords, is_finished, is_prose
from align.data.quality.words import count_words

KNOWN = ["The gardener waters her tomatoes in the evening, and the candles burn slowly until she is done."] * 3
BEFORE = "The gardener waters her tomatoes in the evening. After that"


@pytest.mark.parametrize(
    "end", ["she rests.", "she rests 👩‍🔬", "see https://example.org/garden/144", "`x`:\n```sh\nls\n```", "वह सोती है।"]
)
def test_ends_of_complete_texts(end: str) -> None:
    assert is_finished(f"{BEFORE} {end}")


@pytest.mark.parametrize("end", ["she rests:\n\n* modern helmet: 568 candles", "she rests.\n\nBest regards,\nToma"])
def test_lists_and_signatures_need_no_full_stop_and_are_not_cut(end: str) -> None:
    assert not is_prose(f"{BEFORE} {end}")
    assert not LastWords(KNOWN).is_cut(f"{BEFORE} {end}")


@pytest.mark.parametrize("end", ["she and", "she candl", "she rests,", "she (", "she does\n```sh\nls | wc"])
def test_ends_that_show_a_cut(end: str) -> None:
    assert LastWords([*KNOWN, f"{BEFORE} {end}"]).is_cut(f"{BEFORE} {end}")


def test_a_whole_word_shows_no_cut() -> None:
    assert not LastWords(KNOWN).is_cut(f"{BEFORE} she is done")


def test_a_run_without_spaces_is_as_long_as_several_words() -> None:
    assert count_words("It is " + "x" * 80_000) == 4002
    assert count_words("incomprehensibilities occur") == 3
