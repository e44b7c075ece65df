import json
import os
import re
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.report.compare import compare_page, read_runs, write_comparison
from align.report.comparison import (
    Estimate,
    axes_data,
    compared_evaluations,
    comparison_sentence,
    difference,
)
from align.report.run_record import RunRecord
from align.report.svg import STYLES
from align.runs.folder import RunFolder
from policies.errors import UserError
from tests.align.report.runs import record, step, write_run


@pytest.fixture
def two(tmp_path: Path) -> list[RunRecord]:
    write_run(tmp_path / "first")
    write_run(tmp_path / "second", steps=20, beta=0.2, gain=1.0)
    return read_runs([RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")])


@given(st.floats(-9, 9), st.floats(0, 9), st.floats(-9, 9), st.floats(0, 9))
def test_the_interval_of_a_difference_of_symmetric_ones_is_pythagorean(
    second: float, wide: float, first: float, narrow: float
) -> None:
    change = difference(Estimate(second, second - wide, second + wide), Estimate(first, first - narrow, first + narrow))
    half_width = (wide**2 + narrow**2) ** 0.5
    assert change.value == second - first
    assert (change.low, change.high) == pytest.approx((change.value - half_width, change.value + half_width), abs=1e-9)


def test_a_difference_is_marked_only_where_its_interval_excludes_zero(two: list[RunRecord]) -> None:
    rows = dict(compared_evaluations(two))
    assert [cell.text for cell in rows["change of the score"]] == ["+0.25", "+1", "+0.75 (+0.467 to +1.03)"]
    assert [cell.is_clear for cell in rows["change of the score"]] == [False, False, True]
    wins = rows["win rate by score"]
    assert (wins[2].text[:5], wins[2].is_clear) == ("+0.0%", False)
    kl = rows["KL, nats per sequence"]
    assert (kl[2].text, kl[2].is_clear) == ("+0", False)


def test_the_sentence_names_clear_differences_alone(two: list[RunRecord], tmp_path: Path) -> None:
    first = two[0]
    assert comparison_sentence(two) == "second changed the score by +1, 0.75 above the +0.25 of first."
    assert comparison_sentence(two[::-1]) == "first changed the score by +0.25, 0.75 below the +1 of second."
    assert comparison_sentence([first, first]) == "No run changed the score clearly more or less than first."
    unfinished = record(tmp_path / "third", [step(1, reward__mean=1.0)])
    assert comparison_sentence([first, unfinished]) == "2 runs, of which not all have been evaluated."


def test_the_sentence_names_extended_runs(two: list[RunRecord]) -> None:
    said = comparison_sentence([two[0], replace(two[1], is_extended=True)])
    assert said.endswith("+0.25 of first. second was evaluated at step 20 and has been extended since.")


def test_a_clear_fall_is_marked_too(two: list[RunRecord]) -> None:
    rows = dict(compared_evaluations(two[::-1]))
    assert [cell.is_clear for cell in rows["change of the score"]] == [False, False, True]


def test_a_comparison_is_written_to_files_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name)
    runs = [RunFolder(tmp_path / name) for name in ("a", "b")]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for to, words in (
        (pipe, "is not a file"),
        (tmp_path, "is not a file"),
        (tmp_path / "none" / "c.html", "no folder"),
    ):
        with pytest.raises(UserError, match=words):
            write_comparison(runs, to)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "pipe"]


def test_names_of_metrics_are_no_markup(tmp_path: Path) -> None:
    name = 'reward/term/"><b id=injected>'
    runs = [record(tmp_path / run, [step(1) | {name: 1.0, "reward/term/b": 1.0}]) for run in ("a", "b")]
    assert "<b id=injected>" not in compare_page(runs)


def test_the_axes_are_those_of_each_run(tmp_path: Path) -> None:
    metrics = [step(n, kl__per_sequence=0.5 * n, time__step=3.0, time__between=1.0) for n in (1, 2, 3)]
    data = json.loads(axes_data([record(tmp_path, metrics)]))
    assert data["runs"][0]["kl"][:3] == [0.5, 1.0, 1.5]
    assert data["runs"][0]["seconds"][:3] == [4.0, 8.0, 12.0]
    assert data["ranges"]["seconds"] == [4.0, 12.0]
    assert ">seconds</text>" in data["markup"]["seconds"]


def test_the_page_has_the_settings_that_differ_first(two: list[RunRecord]) -> None:
    page = compare_page(two)
    body = re.sub(r"\s*(<[^>]+>\s*)+", "|", page)
    assert "|setting|first|second|ppo.kl.coefficient|0.05|0.2|" in body
    assert page.index('id="settings"') < page.index('id="evaluation"') < page.index("<figure")
    assert '<td class="clear">+0.75 (+0.467 to +1.03)</td>' in page


def test_each_run_has_a_style_of_its_own_in_every_figure(two: list[RunRecord]) -> None:
    figure = re.search(r'<figure id="figure-score".*?</figure>', compare_page(two), re.DOTALL)
    assert figure
    assert re.findall(r'class="curve (s\d)" data-run="(\d)"', figure[0]) == [("s0", "0"), ("s1", "1")]


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "run")
    write_run(tmp_path / "b" / "run")
    runs = read_runs([RunFolder(tmp_path / "a" / "run"), RunFolder(tmp_path / "b" / "run")])
    assert [run.name for run in runs] == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    one = RunFolder(tmp_path / "one")
    with pytest.raises(UserError, match="two or more different runs"):
        write_comparison([one, one], tmp_path / "page.html")
    many = [RunFolder(tmp_path / str(number)) for number in range(STYLES + 1)]
    with pytest.raises(UserError, match="at most 8"):
        write_comparison(many, tmp_path / "page.html")
