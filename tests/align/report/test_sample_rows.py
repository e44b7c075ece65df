import re

from hypothesis import given
from hypothesis import strategies as st

from align.report.sample_rows import LONGEST_TEXT, first_and_last, marked_differences, pairs, shortened
from tests.align.report.runs import sample

WORDS = st.text("ab .<&", max_size=20)


def test_words_that_only_one_text_has_are_marked() -> None:
    before, after = marked_differences("The day is fine.", "The whole day is good.")
    assert before == "The day is <del>fine</del>."
    assert after == "The <ins>whole </ins>day is <ins>good</ins>."


@given(WORDS, WORDS)
def test_without_the_marks_both_texts_are_complete(before: str, after: str) -> None:
    for text, marked in zip((before, after), marked_differences(before, after), strict=True):
        plain = re.sub(r"</?(ins|del)>", "", marked)
        assert plain.replace("&lt;", "<").replace("&amp;", "&") == text


def test_samples_are_those_of_the_first_and_the_last_ppo_step() -> None:
    rows = [
        sample(1, "zero") | {"stage": "sft"},
        sample(1, "one"),
        sample(2, "two"),
        sample(3, "three"),
        sample(3, "4"),
    ]
    assert [shown.prompt for shown in first_and_last(rows)] == ["one", "three", "4"]


def test_the_samples_of_a_single_step_are_shown_once() -> None:
    assert len(first_and_last([sample(1, "one"), sample(1, "two")])) == 2


def test_responses_to_a_prompt_of_both_steps_are_side_by_side() -> None:
    rows = [sample(1, "p", "a b"), sample(1, "q"), sample(9, "p", "a c")]
    (pair,) = pairs(rows)
    assert (pair.prompt, pair.before_label, pair.before) == ("p", "step 1", "a <del>b</del>")
    assert (pair.after_label, pair.after) == ("step 9", "a <ins>c</ins>")


def test_the_reference_is_beside_the_policy_of_the_last_evaluation() -> None:
    rows = [sample(5, "p", "old", reference="r"), sample(9, "p", "new", reference="r"), sample(9, "q", "x")]
    (pair,) = pairs(rows)
    assert (pair.before_label, pair.before, pair.after_label) == ("reference", "<del>r</del>", "policy of step 9")


def test_a_long_text_is_shortened() -> None:
    assert shortened("x" * LONGEST_TEXT) == "x" * LONGEST_TEXT
    assert shortened("x" * (LONGEST_TEXT + 1)) == "x" * LONGEST_TEXT + " …"
