"""Rows of labelled steps, and where steps end in a text."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.preferences import parse_preference
from rewards.step_labels import (
    LabelledSteps,
    LabelScale,
    first_error,
    label_scale,
    labelled_ends,
    parse_steps,
    step_ends,
)

TEXTS = st.text(alphabet="ab \n", max_size=14)


@given(TEXTS, st.sampled_from(["\n", "\n\n", r"\n+", "b"]))
def test_a_step_ends_after_its_last_visible_character(text: str, mark: str) -> None:
    expected = []
    position = 0
    for piece in re.split(f"({mark})", text):  # pieces and marks take turns
        if piece.strip() and not re.fullmatch(mark, piece):
            visible = [i for i, character in enumerate(piece) if not character.isspace()]
            expected.append(position + visible[-1] + 1)
        position += len(piece)
    assert step_ends(text, re.compile(mark)) == expected


@given(st.lists(st.text(alphabet="ab ", min_size=1).filter(str.strip), min_size=1), st.booleans())
def test_the_steps_of_a_row_end_where_they_are_read_in_a_response(steps: list[str], is_complete: bool) -> None:
    example = LabelledSteps("", tuple(steps), (1.0,) * len(steps), is_complete)
    text = example.text("\n\n")
    assert text.endswith("\n\n") != is_complete
    assert labelled_ends(text, steps) == step_ends(text, re.compile("\n\n"))


def test_a_step_that_the_text_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="step 2 is not in the text that its tokens decode to: 'b'"):
        labelled_ends("a c", ["a", "b"])


def test_rows_of_align_and_of_trl_are_the_same() -> None:
    labels = [True, 0, None, "0.25"]
    expected = LabelledSteps("p", ("a", "b", "c", "d"), (1.0, 0.0, None, 0.25))
    assert parse_steps({"prompt": "p", "steps": ["a", "b", "c", "d"], "labels": labels}) == expected
    assert parse_steps({"prompt": "p", "completions": ["a", "b", "c", "d"], "labels": labels}) == expected
    assert parse_steps({"prompt": "p", "steps": '["a"]', "labels": "[1]", "complete": "true"}).is_complete


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"steps": ["a"]}, "no `labels`"),
        ({"steps": ["a", "b"], "labels": [1]}, "1 `labels` for 2 `steps`"),
        ({"completions": ["a"], "labels": [None]}, "no step has a label"),
        ({"steps": ["a", " "], "labels": [1, 1]}, r"`steps\[1\]` is empty"),
        ({"steps": [], "labels": []}, "`steps` is an empty list; a list of texts was expected"),
        ({"steps": "a", "labels": [1]}, "`steps` is text; a list of texts was expected"),
        ({"steps": ["a"], "labels": ["good"]}, r"`labels\[0\]` is 'good'; a number was expected"),
        ({"steps": ["a"], "labels": 1}, "`labels` is a number; a list with a label for each step"),
        (
            {"chosen": "a", "rejected": "b"},
            "a row of preferences; a reward model learns labels of steps or",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_steps({"prompt": "p"} | row)


def test_steps_among_preferences_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"the row has `labels` of steps: .* data.step_labels"):
        parse_preference({"prompt": "p", "completions": ["a"], "labels": [True]})


def test_labels_from_0_to_1_are_probabilities_and_others_are_numbers() -> None:
    def scale(*labels: float | None) -> LabelScale:
        return label_scale([LabelledSteps("", ("",) * len(labels), labels)])

    assert scale(0.0, None, 0.3, 1.0) == LabelScale()
    assert scale(-1.0, None, 3.0) == LabelScale(are_probabilities=False, mean=1.0, std=2.0)
    assert scale(2.0, 2.0).std == 1.0


def test_the_first_error_is_open_behind_a_step_without_a_label() -> None:
    assert first_error([1.0, 0.5, 0.4, 1.0]) == 2
    assert first_error([1.0, 0.5]) == -1
    assert first_error([1.0, 0.0, None]) == 1
    assert first_error([1.0, None, 0.0]) is None
