"""The forms of rows that are read: align's own columns, and those of public data sets, which are brought into them.

`python -m align.data.forms` prints the table in docs/settings.md.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from align.config.schema import SourceSettings
from align.data import conversions
from align.data.readers import read_rows
from align.data.source_row import SourceRow
from policies.errors import UserError
from policies.text.columns import Values

DataKind = Literal["demonstrations", "preferences", "step_labels", "prompts"]
DATA_KINDS: tuple[DataKind, ...] = get_args(DataKind)
CHECKED_KINDS: tuple[DataKind, ...] = ("demonstrations", "preferences", "prompts")
"""The kinds of rows that `align data check` checks."""


def _as_it_is(values: Values) -> list[Values]:
    return [values]


def _always(values: Values) -> bool:
    return True


def _never(values: Values) -> bool:
    return False


@dataclass(frozen=True)
class Form:
    """A form of rows.

    Attributes:
        kind: What its rows are.
        name: Its name, as in `form` of a source.
        columns: The columns by which a row of this form is recognised.
        meaning: How a row is read, for the documentation.
        convert: Gives the rows in align's columns; raises ValueError with the reason where a value is wrong.
        suits: Whether a row that has the columns is of this form, by their values.
    """

    kind: DataKind
    name: str
    columns: tuple[str, ...]
    meaning: str
    convert: Callable[[Values], list[Values]] = _as_it_is
    suits: Callable[[Values], bool] = _always


FORMS = (
    Form("demonstrations", "completion", ("prompt", "completion"), meaning="text, or messages"),
    Form("demonstrations", "messages", ("messages",), meaning="a conversation"),
    Form(
        "demonstrations",
        "sharegpt",
        ("conversations",),
        meaning="a conversation of `from` and `value`; `human` is the user and `gpt` the assistant; optional `system`",
        convert=conversions.conversation,
    ),
    Form(
        "demonstrations",
        "alpaca",
        ("instruction", "output"),
        meaning="a message by the user, `instruction` with `input` below it, and the reply; optional `system`",
        convert=conversions.instruction_and_reply,
    ),
    Form("demonstrations", "text", ("text",), meaning="plain text, all of it trained"),
    Form(
        "preferences",
        "binarised",
        ("chosen", "rejected"),
        meaning="message lists that contain the `prompt`; where `score_chosen` equals `score_rejected`, a tie",
        convert=conversions.binarised,
        suits=conversions.is_binarised,
    ),
    Form(
        "preferences",
        "sharegpt-pair",
        ("conversations", "chosen", "rejected"),
        meaning="a pair after a conversation of `from` and `value`",
        convert=conversions.sharegpt_pair,
    ),
    Form(
        "preferences",
        "alpaca-pair",
        ("instruction", "chosen", "rejected"),
        meaning="a pair after a message by the user, `instruction` with `input` below it",
        convert=conversions.instruction_prompt,
    ),
    Form("preferences", "pair", ("chosen", "rejected"), meaning="a pair after `prompt`, or as whole transcripts"),
    Form("preferences", "choice", ("responses", "best"), meaning="the best of several responses to `prompt`"),
    Form("preferences", "ranking", ("responses", "ranks"), meaning="ranked responses to `prompt`"),
    Form("preferences", "rating", ("response", "rating"), meaning="a rated response to `prompt`"),
    Form(
        "preferences",
        "ultrafeedback",
        ("instruction", "completions"),
        meaning="a ranking of each `response` by its `overall_score` or, without one, by the mean of its `annotations`",
        convert=conversions.ultrafeedback_ranking,
    ),
    Form(
        "preferences",
        "ultrafeedback-ratings",
        ("instruction", "completions"),
        meaning="a rating of each `response` by the attributes of its `annotations`; only where `form` names it",
        convert=conversions.ultrafeedback_ratings,
        suits=_never,
    ),
    Form(
        "step_labels",
        "steps",
        ("prompt", "steps", "labels"),
        meaning="a response in steps, with a label for each: true, false, a number, or null for none; optional "
        "`complete`: the response ends with the last step",
    ),
    Form("step_labels", "trl", ("prompt", "completions", "labels"), meaning="the same, as TRL's PRMTrainer reads it"),
    Form(
        "step_labels",
        "math-shepherd",
        ("input", "label", "task"),
        meaning="a problem with a solution whose steps end with `ки` in `input`, and with `+` or `-` in `label`",
        convert=conversions.math_shepherd,
    ),
    Form(
        "step_labels",
        "prm800k",
        ("question", "label"),
        meaning="a response for the chosen steps, and one for each other completion of a step, whose label alone is "
        "new; ratings of 0 and 1 are right, -1 is wrong",
        convert=conversions.prm800k,
    ),
    Form(
        "step_labels",
        "processbench",
        ("problem", "steps", "label"),
        meaning="a solution and the index of its first wrong step, or -1; the steps after it have no labels",
        convert=conversions.processbench,
    ),
    Form("prompts", "prompt", ("prompt",), meaning="text, or messages"),
    Form(
        "prompts",
        "sharegpt",
        ("conversations",),
        meaning="the conversation up to the assistant's last reply, which becomes `completion`",
        convert=conversions.conversation_prompt,
    ),
    Form(
        "prompts",
        "alpaca",
        ("instruction",),
        meaning="a message by the user, `instruction` with `input` below it",
        convert=conversions.instruction_prompt,
    ),
)
"""All forms; of those that a row could have, the first of its kind counts."""
FORMS_BY_KIND: dict[DataKind, list[Form]] = {}
for _form in FORMS:
    FORMS_BY_KIND.setdefault(_form.kind, []).append(_form)


def forms_of(kind: DataKind) -> dict[str, Form]:
    """The forms of a kind by name."""
    return {form.name: form for form in FORMS_BY_KIND[kind]}


def form_of_row(values: Values, kind: DataKind) -> Form | None:
    """The form of a row; None where it is of none."""
    filled = {name for name, value in values.items() if value is not None}
    for form in FORMS_BY_KIND[kind]:
        if filled.issuperset(form.columns) and form.suits(values):
            return form
    return None


def in_align_columns(row: SourceRow, kind: DataKind, form: Form | None = None) -> list[SourceRow]:
    """The row in align's columns.

    Args:
        row: A row with the columns of any form.
        kind: What it is.
        form: Its form; None: recognised by its columns. A row of no form stays as it is.

    Returns:
        One row, or several where the form holds several examples. A row that cannot be converted has a problem.
    """
    form = form or form_of_row(row.values, kind)
    if row.problem or form is None or form.convert is _as_it_is:
        return [row]
    try:
        return [replace(row, values=dict(values)) for values in form.convert(row.values)]
    except ValueError as error:
        return [replace(row, problem=f"{form.name}: {error}")]


def read_source_rows(
    source: SourceSettings, kind: DataKind, note: Callable[[str], None] = lambda text: None
) -> list[SourceRow]:
    """Read the rows of a source, in align's columns.

    Args:
        source: As for `read_rows`; its `form` names the form of all its rows.
        kind: What the rows are.
        note: Is told how columns and rows of other forms are read.

    Raises:
        UserError: As for `read_rows`; or there is no form of this name.
    """
    form = _named(source, kind)
    rows = read_rows(source, note)
    converted: list[SourceRow] = []
    counts: Counter[str] = Counter()
    for row in rows:
        found = form or form_of_row(row.values, kind)
        if found and found.convert is not _as_it_is:
            counts[found.name] += 1
        converted += in_align_columns(row, kind, found)
    for name, count in counts.items():
        note(f"{count} of {len(rows)} rows are read as {name}: {forms_of(kind)[name].meaning}")
    return converted


def _named(source: SourceSettings, kind: DataKind) -> Form | None:
    if source.form is None:
        return None
    forms = forms_of(kind)
    if source.form not in forms:
        raise UserError(f"there is no form {source.form!r} of {kind}; forms: {', '.join(forms)}")
    return forms[source.form]


def forms_table(forms: Sequence[Form] = FORMS) -> str:
    """The forms as a table in Markdown."""
    lines = ["| kind | form | columns | how a row is read |", "|---|---|---|---|"]
    for form in forms:
        columns = ", ".join(f"`{name}`" for name in form.columns)
        lines.append(f"| {form.kind} | `{form.name}` | {columns} | {form.meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(forms_table(), end="")
