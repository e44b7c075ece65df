"""The steps that clean data: each drops rows that a check finds, or changes texts.

`python -m align.data.quality.steps` prints the table in docs/data-check.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from align.data.quality.characters import control_tokens, find_odd_characters
from align.data.quality.check import Flagged
from align.data.quality.corpus import Corpus
from align.data.quality.duplicates import find_exact_duplicates, find_heldout_overlap, find_near_duplicates
from align.data.quality.endings import find_cut_off
from align.data.quality.judgements import find_contradictions
from align.data.quality.lengths import find_outlier_lengths
from align.data.quality.rendering import find_template_failures
from align.data.quality.repairs import Change, normalised_unicode, with_texts
from align.data.quality.rows import CheckedRow, check_row
from align.data.quality.structure import find_empty_fields, find_equal_pairs, find_turn_order
from align.data.source_row import SourceRow
from policies.errors import UserError


@dataclass(frozen=True)
class CleaningStep:
    """A step that cleans data.

    Attributes:
        name: As in `--steps`.
        does: What it does, for the documentation.
        apply: Returns the rows that are left, changed or not.
        is_default: Whether it is made where `--steps` is not given, provided that it can be.
        missing: What it needs and the corpus does not have; None: nothing.
    """

    name: str
    does: str
    apply: Callable[[Corpus], Sequence[CheckedRow]]
    is_default: bool = False
    missing: Callable[[Corpus], str | None] = lambda corpus: None


@dataclass(frozen=True)
class StepCount:
    """What a step has done: how many rows it removed and changed, and how many are left."""

    name: str
    removed: int
    changed: int
    rows: int


def _without(find: Callable[[Corpus], Flagged | None]) -> Callable[[Corpus], Sequence[CheckedRow]]:
    """A step that drops the rows that a check finds."""

    def apply(corpus: Corpus) -> Sequence[CheckedRow]:
        flagged = find(corpus)
        dropped = set(flagged.rows) if flagged else set()
        return [row for index, row in enumerate(corpus.rows) if index not in dropped]

    return apply


def _with_change(change_of: Callable[[Corpus], Change]) -> Callable[[Corpus], Sequence[CheckedRow]]:
    """A step that changes the texts of all rows."""

    def apply(corpus: Corpus) -> Sequence[CheckedRow]:
        change = change_of(corpus)
        return [_changed_row(corpus, row, change) for row in corpus.rows]

    return apply


def _changed_row(corpus: Corpus, row: CheckedRow, change: Change) -> CheckedRow:
    """The row with its texts changed; the same object where none is."""
    columns = with_texts(row.columns, change)
    if columns == row.columns:
        return row
    return check_row(SourceRow(row.where, columns), row.file, corpus.kind, row.form)


def _without_control_tokens(corpus: Corpus) -> Change:
    return partial(control_tokens(corpus).sub, "")


def _readable(corpus: Corpus) -> Sequence[CheckedRow]:
    return [row for row in corpus.rows if row.content is not None]


def _within_limit(corpus: Corpus) -> Sequence[CheckedRow]:
    limit = corpus.max_length
    assert limit is not None  # otherwise the step is refused
    long = {index for index, length in corpus.lengths.items() if length.row > limit}
    return [row for index, row in enumerate(corpus.rows) if index not in long]


def _no_heldout(corpus: Corpus) -> str | None:
    return None if corpus.heldout is not None else "--heldout"


def _no_model(corpus: Corpus) -> str | None:
    return None if corpus.encoder else "--model"


def _no_limit(corpus: Corpus) -> str | None:
    return None if corpus.max_length is not None else "--max-length"


CLEANING_STEPS = (
    CleaningStep(
        "normalise-unicode",
        "decodes mojibake, brings texts into Unicode's form C, and removes control, invisible and private characters",
        apply=_with_change(lambda corpus: normalised_unicode),
        is_default=True,
    ),
    CleaningStep(
        "strip-control-tokens",
        "removes the text of control tokens",
        apply=_with_change(_without_control_tokens),
    ),
    CleaningStep("drop-empty", "drops what `empty-fields` finds", apply=_without(find_empty_fields), is_default=True),
    CleaningStep(
        "drop-equal-pairs", "drops what `equal-pairs` finds", apply=_without(find_equal_pairs), is_default=True
    ),
    CleaningStep("drop-unreadable", "drops rows that a run would refuse", apply=_readable, is_default=True),
    CleaningStep("drop-turn-order", "drops what `turn-order` finds", apply=_without(find_turn_order)),
    CleaningStep("drop-odd-characters", "drops what `odd-characters` finds", apply=_without(find_odd_characters)),
    CleaningStep("drop-cut-off", "drops what `cut-off-texts` finds, fact or problem", apply=_without(find_cut_off)),
    CleaningStep(
        "drop-template-failures",
        "drops what `chat-template-failures` finds",
        apply=_without(find_template_failures),
        missing=_no_model,
    ),
    CleaningStep(
        "drop-exact-duplicates",
        "keeps the first of the rows that say the same",
        apply=_without(find_exact_duplicates),
        is_default=True,
    ),
    CleaningStep(
        "drop-near-duplicates",
        "keeps the first of the rows that say nearly the same",
        apply=_without(find_near_duplicates),
        is_default=True,
    ),
    CleaningStep(
        "drop-contradictions", "drops all rows that `contradicting-rankings` finds", apply=_without(find_contradictions)
    ),
    CleaningStep(
        "drop-heldout-overlap",
        "drops rows whose prompt is in a file of `--heldout`",
        apply=_without(find_heldout_overlap),
        is_default=True,
        missing=_no_heldout,
    ),
    CleaningStep(
        "limit-length",
        "drops rows longer than `--max-length` or, with a model, its context length",
        apply=_within_limit,
        is_default=True,
        missing=_no_limit,
    ),
    CleaningStep("drop-outlier-lengths", "drops what `outlier-lengths` finds", apply=_without(find_outlier_lengths)),
)
"""All steps; those of the default are made in this order."""


def chosen_steps(names: Sequence[str] | None, corpus: Corpus) -> list[CleaningStep]:
    """The steps of these names, in their order; None: those of the default that can be made.

    Raises UserError for an unknown name, and where a step needs an option that is not given.
    """
    if names is None:
        return [step for step in CLEANING_STEPS if step.is_default and step.missing(corpus) is None]
    by_name = {step.name: step for step in CLEANING_STEPS}
    steps: list[CleaningStep] = []
    for name in names:
        if name not in by_name:
            raise UserError(f"--steps: there is no step {name!r}; steps: {', '.join(by_name)}")
        needed = by_name[name].missing(corpus)
        if needed:
            raise UserError(f"--steps: {name} needs {needed}")
        steps.append(by_name[name])
    return steps


def make_steps(corpus: Corpus, steps: Sequence[CleaningStep]) -> tuple[Corpus, list[StepCount]]:
    """Make the steps in order.

    Returns:
        The rows that are left, and what each step has done.
    """
    counts: list[StepCount] = []
    for step in steps:
        rows = step.apply(corpus)
        before = set(map(id, corpus.rows))
        changed = sum(id(row) not in before for row in rows)
        counts.append(StepCount(step.name, len(corpus.rows) - len(rows), changed, len(rows)))
        corpus = corpus.with_rows(rows)
    return corpus, counts


def steps_table() -> str:
    """The steps as a table in Markdown."""
    lines = ["| step | what it does | default |", "|---|---|---|"]
    lines += [f"| `{step.name}` | {step.does} | {'yes' if step.is_default else ''} |" for step in CLEANING_STEPS]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(steps_table(), end="")
