"""Rows that are empty, unreadable, have equal sides, or whose messages are in a wrong order."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from align.data.conversions import SHAREGPT_ROLES
from align.data.forms import FORMS
from align.data.quality.characters import odd_in_row
from align.data.quality.check import FEWEST_ROWS, Flagged, flagged_by_reason, reasons_by_row
from align.data.quality.corpus import Corpus
from align.data.quality.rows import CheckedRow, texts_in
from align.data.quality.transcripts import last_reply, transcript_roles
from align.data.quality.words import unspaced
from policies.text.columns import kind as kind_of_value

UNUSUAL_SHARE = 0.05
"""A column that so few rows have, or lack, is inconsistent."""
OPTIONAL = {"system", "input", "tools", "margin", "confidence", "tie", "ties", "attribute"}
"""Columns that a row may have or lack, beside those of the forms."""
SPEAKERS = {"system", "developer", "user", "assistant", "tool"}
AFTER = {
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
"""Who may speak after whom."""


def empty_field(row: CheckedRow, required: set[str]) -> str | None:
    """The first column of a row that is empty, or has an empty part; None where there is none.

    Args:
        row: The row.
        required: Columns that a row of its file has, beside those of its form.
    """
    for name in (*sorted(required), *(row.form.columns if row.form else ())):
        value = row.columns.get(name)
        if name in ("chosen", "rejected") and isinstance(value, str):
            value = last_reply(value)
        if _is_missing(row, name) or (isinstance(value, str) and not value.strip()):
            return f"`{name}` is empty"
        if _has_empty_part(value):
            return f"a part of `{name}` is empty"
    return None


def _is_missing(row: CheckedRow, name: str) -> bool:
    """Whether a column has no value. Readers of CSV leave out empty cells, so that a missing column is one there."""
    if name in row.columns:
        return row.columns[name] is None
    return bool(row.columns) and ".csv:" in row.where


def _has_empty_part(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return _is_empty_message(value)
    if isinstance(value, Sequence):
        return not value or any(_has_empty_part(item) for item in value)
    return False


def _is_empty_message(message: Mapping[str, Any]) -> bool:
    """Whether a message or completion says nothing. Messages of the system may; so may those that call functions."""
    role = message.get("role", message.get("from"))
    if role in ("system", "developer") or message.get("tool_calls") or message.get("function_call"):
        return False
    said = [message.get(key) for key in ("content", "value", "response")]
    return not any(text.strip() if isinstance(text, str) else text is not None for text in said)


def find_empty_fields(corpus: Corpus) -> Flagged | None:
    """Rows with a column, message or response without text."""
    reasons = reasons_by_row(corpus.rows, lambda row: empty_field(row, corpus.required[row.file]))
    return flagged_by_reason(reasons, "with an empty field")


def equal_sides(row: CheckedRow) -> str | None:
    """Whether two responses of a comparison are the same, white space aside."""
    if "chosen" in row.columns:
        sides = [list(texts_in(row.columns.get(name))) for name in ("chosen", "rejected")]
        names = "`chosen` and `rejected`"
    else:
        sides = [[text] for text in texts_in(row.values.get("responses"))]
        names = "two `responses`"
    texts = [tuple(map(unspaced, side)) for side in sides if any(map(str.strip, side))]
    if len(set(texts)) == len(texts):
        return None
    are_same = len(set(map(tuple, sides))) < len(sides)
    return f"{names} are {'the same' if are_same else 'the same but for white space'}"


def find_equal_pairs(corpus: Corpus) -> Flagged | None:
    """Comparisons of a response with itself."""
    return flagged_by_reason(reasons_by_row(corpus.rows, equal_sides), "with equal responses")


def wrong_turns(row: CheckedRow) -> str | None:
    """What is wrong with the order or the roles of the messages of a row."""
    ends = {"messages": "assistant", "chosen": "assistant", "rejected": "assistant", "prompt": "user"}
    kind = row.form.kind if row.form else None
    for name in ("messages", "conversations", "prompt", "chosen", "rejected"):
        value = row.values.get(name)
        if name not in row.text_columns or not value:
            continue
        if name == "conversations" and kind == "demonstrations":
            ends[name] = "assistant"
        names = SHAREGPT_ROLES if name == "conversations" else {}  # in other columns a run takes roles as they are
        is_text = isinstance(value, str)
        problem = transcript_problem(value) if is_text else _problem_of_messages(value, ends.get(name), names)
        if problem:
            return f"{problem} in `{name}`"
    return None


def transcript_problem(text: str) -> str | None:
    """What is wrong with the turns of a transcript of HH-RLHF; None for other texts."""
    return _wrong_order(transcript_roles(text))


def _problem_of_messages(value: Any, end: str | None, names: Mapping[str, str]) -> str | None:
    """What is wrong with the order or the roles of messages; end: who speaks last; names: other names of roles."""
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        return None
    roles: list[str] = []
    for message in value:
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or not role:
            return "a message without a role"
        role = role if role in SPEAKERS else names.get(role, role)
        if role not in SPEAKERS:
            return f"the unknown role {role!r}"
        roles.append(role)
    if len(roles) == 1 and roles[0] == "assistant" and end == "assistant":
        return None  # the response alone, after a separate prompt
    problem = _wrong_order(roles)
    if problem:
        return problem
    if end and roles[-1] != end and not (end == "user" and roles[-1] == "tool"):
        return f"the last message is by the {roles[-1]}"
    return None


def _wrong_order(roles: Sequence[str]) -> str | None:
    spoken = list(roles[1:]) if roles and roles[0] in ("system", "developer") else list(roles)
    if any(role in ("system", "developer") for role in spoken):
        return "a message by the system that is not the first"
    if spoken and spoken[0] != "user":
        return f"the first message is by the {spoken[0]}"
    for before, after in pairwise(spoken):
        if before == after and after != "tool":
            return f"two turns by the {after} in a row"
        if after not in AFTER[before]:
            return f"a turn by the {after} after one by the {before}"
    return None


def find_turn_order(corpus: Corpus) -> Flagged | None:
    """Rows whose messages are in a wrong order, or lack a role."""
    return flagged_by_reason(reasons_by_row(corpus.rows, wrong_turns), "with turns in a wrong order")


def find_unreadable(corpus: Corpus) -> Flagged | None:
    """Rows that a run would refuse, for reasons that are no finding of their own; and rows of other columns."""
    reasons: dict[int, str] = {}
    for index, row in enumerate(corpus.rows):
        if row.problem and not _is_explained(row, corpus.required[row.file]):
            reasons[index] = row.problem
    for index, reason in _inconsistent_columns(corpus).items():
        reasons.setdefault(index, reason)
    return flagged_by_reason(reasons, "not readable, or with other columns than most")


def _is_explained(row: CheckedRow, required: set[str]) -> bool:
    """Whether another check names the reason why a row cannot be read."""
    return bool(empty_field(row, required) or equal_sides(row) or wrong_turns(row) or odd_in_row(row))


def _inconsistent_columns(corpus: Corpus) -> dict[int, str]:
    """Rows with a column that few rows of their file have, without one that nearly all have, or of another type."""
    reasons: dict[int, str] = {}
    known = OPTIONAL.union(*(form.columns for form in FORMS if form.kind == corpus.kind), {"prompt"})
    for file in range(len(corpus.files)):
        rows = {index: row for index, row in enumerate(corpus.rows) if row.file == file and row.columns}
        if len(rows) >= FEWEST_ROWS:
            reasons |= _unusual_columns(rows, known)
    return reasons


def _unusual_columns(rows: Mapping[int, CheckedRow], known: set[str]) -> dict[int, str]:
    """Unusual columns and types among the rows of one file, by the index of the row."""
    few = UNUSUAL_SHARE * len(rows)
    counts: Counter[str] = Counter()
    types: Counter[tuple[str, str]] = Counter()
    for row in rows.values():
        counts.update(row.columns.keys() - known)
        types.update(_types(row, known))
    rare = {name for name, count in counts.items() if count < few}
    usual = {name for name, count in counts.items() if len(rows) - count < few}
    rare_types = {key for key, count in types.items() if key[0] not in rare and count < few}
    reasons: dict[int, str] = {}
    for index, row in rows.items():
        absent = () if ".csv:" in row.where else usual - row.columns.keys()
        other = sorted(rare_types.intersection(_types(row, known)))
        if added := rare & row.columns.keys():
            reasons[index] = f"only few rows have `{min(added)}`"
        elif absent:
            reasons[index] = f"no `{min(absent)}`, which nearly all rows have"
        elif other:
            reasons[index] = f"`{other[0][0]}` is {other[0][1]}, which it is in few rows"
    return reasons


def _types(row: CheckedRow, known: set[str]) -> list[tuple[str, str]]:
    """The type of each further column that has a value."""
    return [
        (name, kind_of_value(value)) for name, value in row.columns.items() if name not in known and value is not None
    ]
