import json
from pathlib import Path
from typing import Any

import pytest

from rewards.preferences import Pair, parse_pair

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
OTHER = [CHAT[0], {"role": "assistant", "content": "What?"}]
HARMLESS = Path(__file__).parents[3] / "shared" / "data" / "hh" / "harmless.jsonl"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, Pair("p", "c", "r")),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": 2}, Pair("p", "c", "r", margin=2.0)),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": "0.5"}, Pair("p", "c", "r", margin=0.5)),
        ({"prompt": "p", "chosen": "c", "rejected": "c", "tie": True}, Pair("p", "c", "c", tie=True)),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "tie": "false"}, Pair("p", "c", "r")),
        ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": OTHER[1:]}, Pair(CHAT[:1], "Hello", "What?")),
        ({"chosen": CHAT, "rejected": OTHER}, Pair(CHAT[:1], "Hello", "What?")),
    ],
)
def test_pairs_in_every_form(values: dict[str, Any], expected: Pair) -> None:
    assert parse_pair(values) == expected


def test_a_common_beginning_may_run_on_into_the_reply() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A joke?\n\nAssistant:"
    pair = parse_pair({"chosen": start + " I will not.", "rejected": start + " I will."})
    assert pair == Pair(start, " I will not.", " I will.")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": "p", "rejected": "r"}, "no `chosen`; the row has `prompt`, `rejected`"),
        ({"prompt": "p", "chosen": "c"}, "no `rejected`"),
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, "are the same"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": "x"}, "`margin` is 'x'; a number"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": float("nan")}, "a number"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "tie": "maybe"}, "true or false"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "tie": True, "margin": 1}, "a tie has no `margin`"),
        ({"chosen": "c", "rejected": "r"}, "no common beginning"),
        ({"chosen": CHAT, "rejected": CHAT[:1]}, "the same messages but for the last"),
        ({"chosen": CHAT, "rejected": 3}, "`rejected` is a number"),
    ],
)
def test_bad_pairs(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_pair(values)


@pytest.mark.skipif(not HARMLESS.is_file(), reason="shared/data is not here")
def test_real_transcripts() -> None:
    bad = 0
    for line in HARMLESS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        try:
            pair = parse_pair(row)
        except ValueError:
            bad += 1
            continue
        assert pair.prompt.endswith("\n\nAssistant:")
        assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (row["chosen"], row["rejected"])
    assert bad <= 5
