"""Described cases get the technique that the table of docs/choose.md gives them."""

from pathlib import Path
from typing import get_args

import pytest

from align.choice.facts import TASKS, Facts
from align.choice.rules import CHOICE_RULES, Technique, choose_rule, rules_of, rules_table
from policies.errors import UserError

ROOT = Path(__file__).parents[3]
BILLION = 1_000_000_000

CASES: dict[str, tuple[Facts, Technique]] = {
    "ten complaints, sorted into two kinds by hand": (
        Facts("classify", BILLION, {"labels": 10}, classes=2),
        "prompting",
    ),
    "600 reviews of two classes": (Facts("classify", BILLION, {"labels": 600}, classes=2), "classification head"),
    "600 questions of fifty classes": (Facts("classify", BILLION, {"labels": 600}, classes=50), "prompting"),
    "20,000 grades of essays, which are numbers": (
        Facts("classify", BILLION, {"labels": 20_000}),
        "classification head",
    ),
    "a dozen examples of a report's format": (Facts("respond", 8 * BILLION, {"demonstrations": 12}), "prompting"),
    "300 answers of a help desk, and a model of 70 B": (
        Facts("respond", 70 * BILLION, {"demonstrations": 300}),
        "soft prompt",
    ),
    "300 answers of a help desk, and a model of 1 B": (Facts("respond", BILLION, {"demonstrations": 300}), "PEFT"),
    "200,000 instructions, and memory for all weights": (
        Facts("respond", BILLION, {"demonstrations": 200_000}, full_fits=True),
        "full fine-tuning",
    ),
    "200,000 instructions on a small GPU": (
        Facts("respond", 8 * BILLION, {"demonstrations": 200_000}, full_fits=False),
        "PEFT",
    ),
    "handbooks that change every month": (
        Facts("facts", BILLION, {"texts": 800}, text_tokens=2_000_000, full_fits=True),
        "retrieval",
    ),
    "answers to questions about a product": (Facts("facts", BILLION, {"demonstrations": 5_000}), "retrieval"),
    "court decisions of 50 M tokens, and memory for all weights": (
        Facts("domain", BILLION, {"texts": 9_000}, text_tokens=50_000_000, full_fits=True),
        "continued pre-training",
    ),
    "letters of 1 M tokens in a dialect": (
        Facts("domain", BILLION, {"texts": 900}, text_tokens=1_000_000, full_fits=True),
        "continued pre-training",
    ),
    "school mathematics with solutions": (Facts("prefer", BILLION, {"answers": 7_000}), "RLHF"),
    "40 pairs of responses": (Facts("prefer", BILLION, {"preferences": 40}, rlhf_fits=True), "prompting"),
    "5,000 pairs, further prompts, and memory for PPO": (
        Facts("prefer", BILLION, {"preferences": 5_000, "prompts": 9_000}, rlhf_fits=True),
        "RLHF",
    ),
    "5,000 pairs and further prompts on a small GPU": (
        Facts("prefer", 8 * BILLION, {"preferences": 5_000, "prompts": 9_000}, rlhf_fits=False),
        "preference optimisation",
    ),
    "5,000 pairs alone": (Facts("prefer", BILLION, {"preferences": 5_000}, rlhf_fits=True), "preference optimisation"),
    "thumbs up and down": (Facts("prefer", BILLION, {"verdicts": 3_000}), "preference optimisation"),
    "stars from one to five": (Facts("prefer", BILLION, {"ratings": 3_000}), "RLHF"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_case_gets_its_technique(case: str) -> None:
    facts, technique = CASES[case]
    assert choose_rule(facts).technique == technique


def test_every_rule_and_every_technique_has_a_case() -> None:
    chosen = {choose_rule(facts).when for facts, _ in CASES.values()}
    assert chosen == {rule.when for rule in CHOICE_RULES}
    assert len(chosen) == len(CHOICE_RULES)
    assert {rule.technique for rule in CHOICE_RULES} == set(get_args(Technique))


def test_the_table_in_the_documents_is_that_of_the_rules() -> None:
    assert rules_table() in (ROOT / "docs" / "choose.md").read_text(encoding="utf-8"), (
        "docs/choose.md: replace the table by what `python -m align.choice.rules` prints"
    )


@pytest.mark.parametrize("task", TASKS)
def test_data_that_does_not_suit_the_task_is_refused_with_what_would(task: str) -> None:
    known = next(each for each in TASKS if each == task)
    with pytest.raises(UserError, match="the data has 7 prompts; expected one of") as refused:
        choose_rule(Facts(known, BILLION, {"prompts": 7}))
    assert all(rule.when in str(refused.value) for rule in rules_of(known))
