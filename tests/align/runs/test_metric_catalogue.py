from collections import Counter
from pathlib import Path

import pytest

from align.config.stage import all_stages
from align.runs.metric_catalogue import (
    EVALUATION,
    SECTIONS,
    UPSTREAM,
    WITHOUT_PANEL,
    Panel,
    Section,
    all_metrics,
    find_metric,
    metric_tables,
    shown_in,
)

DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"


def test_the_document_is_that_of_the_catalogue() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == metric_tables()


def test_no_name_stands_twice() -> None:
    assert max(Counter(metric.name for metric in all_metrics()).values()) == 1
    assert max(Counter(panel.name for section in UPSTREAM + SECTIONS for panel in section.panels).values()) == 1


def test_every_metric_is_on_a_panel_or_the_reason_is_given() -> None:
    shown = {name for section in UPSTREAM + SECTIONS for panel in section.panels for name in panel.metrics}
    names = {metric.name for metric in all_metrics()}
    assert names == shown | WITHOUT_PANEL.keys()
    assert not shown & WITHOUT_PANEL.keys()


@pytest.mark.parametrize("section", UPSTREAM + SECTIONS, ids=lambda section: section.name)
def test_a_section_has_at_most_six_panels_of_metrics_that_exist(section: Section) -> None:
    assert 1 <= len(section.panels) <= 6
    assert section.axis in {stage.axis for stage in all_stages()}
    for panel in section.panels:
        for name in panel.metrics:
            assert find_metric(name) is not None, name


def test_names_outside_the_catalogue_are_found_nowhere() -> None:
    assert find_metric("reward/term/helpful") is not None
    assert find_metric("reward/meen") is None


def test_a_panel_shows_what_was_logged_in_its_own_order() -> None:
    panel = Panel("terms", "Terms", "score", ("reward/mean", "reward/term/*"))
    assert shown_in(panel, ["kl/loss", "reward/term/b", "reward/term/a", "reward/mean"]) == [
        "reward/mean",
        "reward/term/b",
        "reward/term/a",
    ]


def test_metrics_of_the_evaluation_have_their_own_group() -> None:
    assert all(metric.name.startswith("eval/") for metric in EVALUATION)
