"""The rule for damaged records: null where a number is not finite, and otherwise an error with file, line and key."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.outputs.run_list import list_runs
from align.report.page import write_report
from align.report.run_record import read_run_record
from align.runs.record_files import EVENTS, METRICS, SAMPLES, read_lines
from policies.errors import UserError
from tests.align.report.runs import step, write_lines, write_run

HISTOGRAM = {"low": 0.0, "high": 2.0, "counts": [1, 0, 3]}


@pytest.mark.parametrize("value", ["high", [1.0], True, {}, {"counts": []}])
def test_a_metric_that_is_no_number_is_an_error_with_file_line_and_key(value: Any, tmp_path: Path) -> None:
    write_lines(tmp_path / METRICS, [step(1, reward__mean=1.0), step(2, reward__mean=value), step(3)])
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: reward/mean is .+, expected a .+ Remove the line"):
        read_lines(tmp_path / METRICS)


@pytest.mark.parametrize(
    "change",
    [
        {"counts": []},
        {"counts": 3},
        {"counts": [1, -1]},
        {"counts": [1, "2"]},
        {"counts": [0.5]},
        {"high": 0.0},
        {"low": None},
        {"high": "2"},
    ],
)
def test_a_histogram_with_broken_bins_is_an_error(change: dict[str, Any], tmp_path: Path) -> None:
    write_lines(tmp_path / METRICS, [step(1) | {"reward/histogram": HISTOGRAM | change}])
    with pytest.raises(UserError, match=r"line 1: reward/histogram is .+, expected a histogram with `low`"):
        read_lines(tmp_path / METRICS)


@pytest.mark.parametrize("written", ["null", "NaN", "Infinity", "-Infinity", "-1e999", "1e301", "1" * 400])
def test_a_number_that_is_not_finite_is_null(written: str, tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text(f'{{"stage": "ppo", "step": 1, "reward/mean": {written}}}\n')
    assert read_lines(tmp_path / METRICS) == [step(1, reward__mean=None)]


@pytest.mark.parametrize("row", [{"stage": 1}, {"step": 1.5}, {"step": "1"}, {"step": -2}, {"step": True}])
def test_a_line_without_a_place_in_the_run_is_an_error(row: dict[str, Any], tmp_path: Path) -> None:
    write_lines(tmp_path / METRICS, [step(1) | row])
    with pytest.raises(UserError, match=f"line 1: {next(iter(row))} is "):
        read_lines(tmp_path / METRICS)


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5000])
def test_a_line_that_no_parser_takes_is_an_error(line: str, tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text(line + "\n" + json.dumps(step(1)) + "\n")
    with pytest.raises(UserError, match="line 1: "):
        read_lines(tmp_path / METRICS)


def test_the_last_line_may_be_half_written_and_no_more(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"stage": "ppo", "step": 1}\n{"stage": "ppo", "step": 2, "rew')
    assert read_lines(tmp_path / METRICS) == [step(1)]
    write_lines(tmp_path / METRICS, [step(1), step(2) | {"reward/mean": "x"}])
    with pytest.raises(UserError, match="line 2"):
        read_lines(tmp_path / METRICS)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [(SAMPLES, "score", "high"), (SAMPLES, "prompt", ["p"]), (SAMPLES, "reference", 1), (EVENTS, "text", None)],
)
def test_damaged_samples_and_events_are_errors_too(file: str, key: str, value: Any, tmp_path: Path) -> None:
    write_lines(tmp_path / file, [step(1) | {key: value}])
    with pytest.raises(UserError, match=f"{file}, line 1: {key} is "):
        read_lines(tmp_path / file)


def test_a_file_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / METRICS).mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read: Is a directory"):
        read_lines(tmp_path / METRICS)


def test_a_metric_that_is_now_a_number_and_now_a_histogram_has_a_page(tmp_path: Path) -> None:
    write_run(tmp_path / "first")
    values: list[Any] = [1.0, HISTOGRAM, None, 1e300, -1e300, 1e300]
    names = ("reward/mean", "reward/histogram", "time/step", "policy/entropy", "kl/per_sequence")
    rows = [step(number) | dict.fromkeys(names, value) for number, value in enumerate(values, start=1)]
    write_lines(tmp_path / "first" / METRICS, rows)
    page = write_report(read_run_record(tmp_path / "first", {}))
    assert "figure-score" in page.read_text()
    assert list_runs(tmp_path)[0].state == "done"
