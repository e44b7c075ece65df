import json
from typing import Any

import pytest

from rewards.preferences import Pair, PreferenceExample, Ranking, Rating, parse_preference
from tests.outside_data import outside_data

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
OTHER = [CHAT[0], {"role": "assistant", "content": "What?"}]
PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


def pair(prompt: Any = "p", chosen: str = "c", rejected: str = "r", **label: Any) -> PreferenceExample:
    return PreferenceExample(prompt, (chosen, rejected), Pair(**label))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (PAIR, pair()),
        (PAIR | {"margin": 2}, pair(margin=2.0)),
        (PAIR | {"margin": "0.5"}, pair(margin=0.5)),
        (PAIR | {"confidence": 0.7}, pair(certainty=0.7)),
        (PAIR | {"rejected": "c", "tie": True}, pair(rejected="c", certainty=0.5)),
        (PAIR | {"tie": "false"}, pair()),
        (PAIR | {"confidence": 0.5, "margin": 0}, pair(certainty=0.5)),
        (PAIR | {"tie": True, "confidence": 0.5}, pair(certainty=0.5)),
        (PAIR | {"tie": False, "confidence": 0.6, "margin": 3}, pair(certainty=0.6, margin=3.0)),
        ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": OTHER[1:]}, pair(CHAT[:1], "Hello", "What?")),
        ({"chosen": CHAT, "rejected": OTHER}, pair(CHAT[:1], "Hello", "What?")),
    ],
)
def test_pairs_in_every_form(values: dict[str, Any], expected: PreferenceExample) -> None:
    assert parse_preference(values) == expected


@pytest.mark.parametrize(
    ("ranks", "order", "sizes"),
    [
        ([2, 1, 3], "bac", (1, 1, 1)),
        ([2, 1, 2], "bac", (1, 2)),
        ([1, 1, 1], "abc", (3,)),
        ([10, 20, 5.5], "cab", (1, 1, 1)),
        ("[3, 1, 1]", "bca", (2, 1)),
    ],
)
def test_rankings_come_best_first_in_groups_of_equal_rank(ranks: Any, order: str, sizes: tuple[int, ...]) -> None:
    values = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": ranks}
    assert parse_preference(values) == PreferenceExample("p", tuple(order), Ranking(sizes))


def test_a_csv_row_has_its_lists_in_json() -> None:
    values = {"prompt": "p", "responses": '["a", "b"]', "ranks": "[2, 1]"}
    assert parse_preference(values) == PreferenceExample("p", ("b", "a"), Ranking((1, 1)))


def test_ties_of_the_row_override_the_setting() -> None:
    values = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 1, 2]}
    assert parse_preference(values, open_ties=True).preference == Ranking((2, 1), open=True)
    assert parse_preference(values | {"ties": "judged"}, open_ties=True).preference == Ranking((2, 1))
    assert parse_preference(values | {"ties": "unknown"}).preference == Ranking((2, 1), open=True)


def test_a_choice_ranks_one_before_all_others_in_unknown_order() -> None:
    values = {"prompt": "p", "responses": ["a", "b", "c"], "best": 2}
    assert parse_preference(values) == PreferenceExample("p", ("c", "a", "b"), Ranking((1, 2), open=True))


def test_a_rating_is_a_number_or_one_per_attribute() -> None:
    row = {"prompt": "p", "response": "r"}
    assert parse_preference(row | {"rating": "4"}) == PreferenceExample("p", ("r",), Rating({"": 4.0}))
    rated = parse_preference(row | {"rating": {"kind": 1, "helpful": 3, "unasked": None}})
    assert rated.preference == Rating({"helpful": 3.0, "kind": 1.0})
    assert rated.attributes == ("helpful", "kind")


def test_comparisons_may_be_by_an_attribute() -> None:
    assert parse_preference(PAIR | {"attribute": "kind"}).attributes == ("kind",)


def test_a_common_prefix_may_extend_into_the_reply() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A joke?\n\nAssistant:"
    example = parse_preference({"chosen": start + " I will not.", "rejected": start + " I will."})
    assert example == pair(start, " I will not.", " I will.")


RANKING = {"prompt": "p", "responses": ["a", "b"]}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": "p", "rejected": "r"}, "no `chosen`; the row has `prompt`, `rejected`"),
        ({"prompt": "p", "chosen": "c"}, "no `rejected`"),
        (PAIR | {"rejected": "c"}, "are the same"),
        (PAIR | {"margin": "x"}, "`margin` is 'x'; a number"),
        (PAIR | {"margin": float("nan")}, "a number"),
        (PAIR | {"tie": "maybe"}, "true or false"),
        (PAIR | {"tie": True, "margin": 1}, "a tie has no `margin`"),
        (PAIR | {"confidence": 0.5, "margin": 3}, "`confidence: 0.5` is a tie, and a tie has no `margin`"),
        (PAIR | {"confidence": "0.50", "margin": -1}, "a tie has no `margin`"),
        (PAIR | {"tie": True, "confidence": 0.9}, "`confidence` is 0.9, and that of a `tie` is 0.5"),
        (PAIR | {"tie": True, "confidence": 3}, "`confidence` is 3: .* from 0.5 to 1"),
        (PAIR | {"confidence": 0.3}, "`confidence` is 0.3: .* from 0.5 to 1"),
        ({"chosen": "c", "rejected": "r"}, "no common prefix"),
        ({"chosen": CHAT, "rejected": CHAT[:1]}, "the same messages except the last"),
        ({"chosen": CHAT, "rejected": 3}, "`rejected` is a number"),
        ({"prompt": "p", "text": "t"}, "neither `chosen` and `rejected`, nor .* the row has `prompt`, `text`"),
        (RANKING, "no `ranks`"),
        (RANKING | {"ranks": [1]}, "1 `ranks` for 2 `responses`"),
        (RANKING | {"ranks": [1, "x"]}, r"`ranks\[1\]` is 'x'"),
        (RANKING | {"ranks": 3}, "`ranks` is a number; a list of numbers"),
        (RANKING | {"ranks": [1, 1], "ties": "unknown"}, "contains no information"),
        (RANKING | {"ranks": [1, 2], "ties": "some"}, "`judged` or `unknown`"),
        (RANKING | {"best": 2}, "from 0 to 1"),
        (RANKING | {"responses": ["a"], "ranks": [1]}, "a list of two or more"),
        (RANKING | {"responses": ["a", ""], "ranks": [1, 2]}, r"`responses\[1\]` is empty"),
        ({"prompt": "p", "responses": ["a"] * 12, "ranks": [1] * 11 + [2], "ties": "unknown"}, "a tie of 11"),
        ({"prompt": "p", "rating": 3}, "no `response`"),
        ({"prompt": "p", "response": "r", "rating": "good"}, "`rating` is 'good'"),
        ({"prompt": "p", "response": "r", "rating": {}}, "an empty object"),
    ],
)
def test_bad_rows(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_preference(values)


def test_real_transcripts() -> None:
    bad = 0
    for line in outside_data("hh/harmless.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        try:
            example = parse_preference(row)
        except ValueError:
            bad += 1
            continue
        assert isinstance(example.prompt, str)
        assert example.prompt.endswith("\n\nAssistant:")
        assert [example.prompt + response for response in example.responses] == [row["chosen"], row["rejected"]]
    assert bad <= 5
