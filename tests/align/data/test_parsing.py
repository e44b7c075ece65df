from pathlib import Path
from typing import Any

import pytest

from align.config.schema import SourceSettings
from align.data.parsing import Demonstration, Transcript, parse_demonstration, parse_prompt, parse_rows
from align.data.readers import read_rows
from policies.errors import UserError
from tests.integration.tiny_run import write_rows

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_bad_rows_are_reported_with_file_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n{"prompt": \n[1]\n{"prompt": 3}\n{"prompt": " "}\n{"text": "x"}\n\xff\n')
    rows = read_rows(SourceSettings(path=str(path)))
    parsed = parse_rows(rows, parse_prompt, "skip")
    assert [item.prompt for item in parsed.items] == ["a"]
    expected = (
        ":3: not valid JSON",
        ":4: a list",
        ":5: `prompt` is a number",
        ":6: `prompt` is empty",
        ":7: no `prompt`",
    )
    for reason, skipped in zip((*expected, ":8: not valid JSON"), parsed.skipped, strict=True):
        assert reason in skipped
    with pytest.raises(UserError, match=rf"{path}:3: not valid JSON") as caught:
        parse_rows(rows, parse_prompt, "error")
    assert "… and 1 more invalid row\n" in str(caught.value)
    assert "on_bad_row=skip" in str(caught.value)


def test_skipping_every_row_is_an_error(tmp_path: Path) -> None:
    rows = read_rows(SourceSettings(path=write_rows(tmp_path / "r.jsonl", [{"x": 1}])))
    with pytest.raises(UserError, match="there is no good row"):
        parse_rows(rows, parse_prompt, "skip")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, Demonstration("p", "c")),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, Demonstration(CHAT[:1], "Hello")),
        ({"messages": CHAT}, Transcript(CHAT)),
        ({"text": "t"}, Demonstration("", "t")),
        ({"prompt": "p", "completion": "c", "text": "pc"}, Demonstration("p", "c")),
    ],
)
def test_demonstrations_in_every_form(values: dict[str, Any], expected: Demonstration | Transcript) -> None:
    assert parse_demonstration(values) == expected


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "no `prompt`; the row has no columns"),
        ({"prompt": "p"}, "no `completion`"),
        ({"prompt": "p", "completion": ""}, "`completion` is empty"),
        ({"prompt": "p", "completion": CHAT}, "one message by the assistant"),
        ({"messages": CHAT[:1]}, "one message"),
        ({"messages": CHAT[::-1]}, "by the assistant"),
        ({"messages": [{"role": "user"}, *CHAT]}, "without the text `role` or the text `content`"),
        ({"messages": "hello"}, "a list of messages was expected"),
        ({"text": 3}, "`text` is a number"),
    ],
)
def test_bad_demonstrations(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_demonstration(values)


def test_other_columns_of_a_prompt_pass_through() -> None:
    row = parse_prompt({"prompt": "p", "answer": "42", "id": 1})
    assert (row.prompt, row.columns) == ("p", {"answer": "42", "id": 1})
