import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from align.diagnosis.verdict import Evidence, Severity, Verdict
from align.report.page import report_page, write_report
from align.report.render import LARGEST_PAGE, render_within_limit
from align.report.run_record import read_run_record
from policies.errors import UserError
from tests.align.report.runs import (
    EVALUATION,
    POLICY,
    REFERENCE,
    REWARD_MODEL,
    record,
    sample,
    step,
    write_lines,
    write_run,
)

VERDICT = Verdict(
    name="reward hacking",
    severity=Severity.SERIOUS,
    stage="ppo",
    text="The score rises while the gold score falls.",
    evidence=(Evidence("reward/gold_mean", 40, -0.5, threshold=0.25, meaning="change from step 20"),),
    advice=("ppo.kl.coefficient=0.1", "Train the reward model on more data."),
)


def page_of(run: Path, evaluation: dict[str, Any] | None = None) -> str:
    return write_report(read_run_record(run, evaluation or {})).read_text("utf-8")


def texts(page: str) -> str:
    """What the page says, with a bar for each tag."""
    return re.sub(r"\s*(<[^>]+>\s*)+", "|", unescape(re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)))


def figures(page: str) -> list[str]:
    return re.findall(r'<figure id="figure-([^"]+)"', page)


def test_there_are_figures_of_what_was_logged_and_of_nothing_else(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [step(1, reward__mean=0.5, policy__loss=0.1), step(2, reward__mean=0.6)])
    assert figures(page_of(tmp_path)) == ["score", "policy-loss"]
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["index.html"]


def test_a_run_that_has_logged_nothing_has_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert figures(page) == []
    assert "The run has logged nothing yet." in page


@pytest.mark.parametrize("row", [step(1, reward__mean=None), step(1), step(1, reward__mean=1.0) | {"stage": "sft"}])
def test_no_figure_of_nulls_or_of_another_stage(tmp_path: Path, row: dict[str, Any]) -> None:
    write_lines(tmp_path / "metrics.jsonl", [row])
    assert figures(page_of(tmp_path)) == []


def test_a_table_under_a_figure_has_its_data(tmp_path: Path) -> None:
    rows = [
        step(1, reward__mean=0.5),
        step(2, reward__mean=None),
        step(3, reward__mean=2 / 3),
        step(3, eval__score_mean=1),
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    body = re.search(r"<tbody>(.*?)</tbody>", page_of(tmp_path), re.DOTALL)
    assert body
    assert re.findall(r"<t[hd][^>]*>([^<]*)", body[1]) == ["1", "0.5", "", "2", "–", "", "3", "0.6667", "1"]


def test_prompts_responses_and_names_are_escaped(tmp_path: Path) -> None:
    run = tmp_path / "a<b>"
    write_lines(run / "samples.jsonl", [sample(1, "<script>alert(1)</script>", "a < b & c", reference="a <i> c")])
    write_lines(run / "metrics.jsonl", [step(1, **{"reward/term/<u>": 1.0})])
    page = page_of(run)
    assert page.count("<script>") == 1
    assert not re.search(r"<b>|<i>|<u>", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<h1>a&lt;b&gt;" in page


def test_a_text_that_is_no_unicode_does_not_stop_a_report(tmp_path: Path) -> None:
    write_lines(tmp_path / "samples.jsonl", [sample(1, "p", "\ud800")])
    assert "samples" in page_of(tmp_path)


def test_the_page_compares_policy_and_reference(tmp_path: Path) -> None:
    page = texts(page_of(tmp_path, EVALUATION))
    assert "Responses to 64 held-out prompts.|figure|reference|policy of step 40|" in page
    assert "|score, mean|0.125|0.375|" in page
    assert "|change of the score|+0.250 (+0.050 to +0.450)|" in page
    assert "gold" not in page


def test_the_first_screen_has_a_sentence_and_four_tiles(tmp_path: Path) -> None:
    page = texts(page_of(tmp_path, EVALUATION | {"reward_model": REWARD_MODEL}))
    assert "PPO raised the score by 0.25 over the SFT model in 40 steps, at a KL of 3 nats per sequence." in page
    assert "|Change of the score|+0.25|95% interval +0.05 to +0.45|from 0.125 to 0.375|" in page
    assert "|KL to the reference|3|nats per sequence|0.5 per token|" in page
    assert "|Wins over the reference|62%|95% interval 50% to 73%|of 64 prompts, by score|" in page
    assert "|Accuracy of the reward model|70%|95% interval 65% to 75%|" in page


def test_a_verdict_is_a_card_with_evidence_and_advice(tmp_path: Path) -> None:
    page = report_page(replace(record(tmp_path), verdicts=[VERDICT]))
    assert "|serious|Reward hacking|The score rises while the gold score falls.|" in texts(page)
    assert "|reward/gold_mean -0.5, change from step 20 (step 40); threshold 0.25|" in texts(page)
    assert "<li><code>ppo.kl.coefficient=0.1</code></li><li>Train the reward model on more data.</li>" in page


def test_advice_that_begins_as_a_setting_and_goes_on_is_a_sentence(tmp_path: Path) -> None:
    advice = ("ppo.steps=3", "rollouts.engine=transformers, which takes longer")
    page = report_page(replace(record(tmp_path), verdicts=[replace(VERDICT, advice=advice)]))
    assert "<li><code>ppo.steps=3</code></li><li>rollouts.engine=transformers, which takes longer</li>" in page


def test_a_run_without_problems_has_a_card_that_says_so(tmp_path: Path) -> None:
    assert "Nothing to judge yet" in page_of(tmp_path)
    write_lines(tmp_path / "metrics.jsonl", [step(1, reward__mean=1.0)])
    page = page_of(tmp_path)
    assert "No problem found" in page
    assert "Nothing to judge yet" not in page


@pytest.mark.parametrize(
    ("file", "row", "words"),
    [
        ("samples.jsonl", {"stage": "ppo", "step": 1, "response": "r", "score": 1.0}, "line 1: it has no prompt"),
        ("events.jsonl", {"stage": "ppo", "step": 1, "event": "e", "text": "t"}, "line 1: it has no time"),
    ],
)
def test_a_line_that_lacks_something_is_an_error_with_its_number(
    file: str, row: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write_lines(tmp_path / file, [row])
    with pytest.raises(UserError, match=f"{file}, {words}"):
        page_of(tmp_path)


def test_an_evaluation_without_its_reference_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.json has a policy and no reference: `align eval"):
        page_of(tmp_path, {"policy": EVALUATION["policy"]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": {}}, r"has no number in policy\.\w+"),
        ({"policy": POLICY | {"length_mean": "long"}}, r"has no number in policy\.length_mean"),
        ({"reference": REFERENCE | {"score_mean": None}}, r"has no number in reference\.score_mean"),
        ({"reference": "sft"}, "has no figures in reference"),
        ({"prompts": None}, "has no number of prompts"),
    ],
)
def test_a_damaged_evaluation_is_an_error(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"evaluation\.json {words}: `align eval"):
        page_of(tmp_path, EVALUATION | change)


def test_the_rules_of_the_diagnosis_read_the_run(tmp_path: Path) -> None:
    rows = [
        step(n, policy__gradient_norm=None, learner__skipped_steps=2, learner__optimizer_steps=2) for n in range(1, 20)
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    assert "|Skipped updates|" in texts(page_of(tmp_path))


def test_the_page_of_a_whole_run_has_its_settings_its_cost_and_how_to_repeat_it(tmp_path: Path) -> None:
    write_run(tmp_path / "first")
    page = texts(page_of(tmp_path / "first", EVALUATION))
    assert "|ppo.steps|40|50|" in page
    assert "|tokens generated|at most 20,480|16,000|" in page
    assert "|memory, sft: controller|800 MB|" in page
    assert "|update|1:20 (57%)|" in page
    assert f"|align run {tmp_path}/first/config.yaml name=first-again|" in page


def test_every_link_of_the_page_leads_to_a_section(tmp_path: Path) -> None:
    write_run(tmp_path / "first")
    page = page_of(tmp_path / "first", EVALUATION)
    anchors = re.findall(r'href="#([^"]+)"', page)
    assert len(anchors) > 8
    assert set(anchors) <= set(re.findall(r' id="([^"]+)"', page))


def test_no_identifier_stands_twice(tmp_path: Path) -> None:
    write_run(tmp_path / "first")
    found = re.findall(r' id="([^"]+)"', page_of(tmp_path / "first", EVALUATION))
    assert len(found) == len(set(found))


def test_the_page_names_no_address_outside(tmp_path: Path) -> None:
    write_run(tmp_path / "first")
    page = page_of(tmp_path / "first", EVALUATION).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|url\(|@import|<link[^>]+href=\"(?!data:)", page)


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [step(1, reward__mean=0.5)])
    page_of(tmp_path)
    write_lines(tmp_path / "metrics.jsonl", [step(1, policy__loss=0.5)])
    assert figures(page_of(tmp_path)) == ["policy-loss"]


def test_a_page_that_would_be_too_large_has_fewer_points() -> None:
    asked: list[int] = []

    def draw(limit: int) -> str:
        asked.append(limit)
        return "x" * (limit * 9000)

    assert len(render_within_limit(draw)) <= LARGEST_PAGE
    assert asked == [400, 200, 100]
