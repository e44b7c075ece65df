from pathlib import Path

from align.report.settings_rows import changed_settings, differing_settings
from tests.align.report.runs import SETTINGS, record


def test_settings_that_are_the_defaults_are_left_out(tmp_path: Path) -> None:
    tmp_path.joinpath("config.yaml").write_text(SETTINGS.format(name="a", beta=0.5))
    rows = changed_settings(record(tmp_path))
    assert ("model.path", "my-model", "–") in rows
    assert ("ppo.kl.coefficient", "0.5", "0.05") in rows
    assert len(rows) <= 4


def test_a_run_without_settings_has_no_rows(tmp_path: Path) -> None:
    assert changed_settings(record(tmp_path)) == []


def test_runs_differ_in_the_settings_that_are_not_the_same(tmp_path: Path) -> None:
    runs = []
    for name, beta in (("a", 0.5), ("b", 0.25)):
        folder = tmp_path / name
        folder.mkdir()
        folder.joinpath("config.yaml").write_text(SETTINGS.format(name=name, beta=beta))
        runs.append(record(folder))
    assert differing_settings(runs) == [("ppo.kl.coefficient", ["0.5", "0.25"])]
