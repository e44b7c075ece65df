"""Tables in the terminal name things in words."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from align.evaluation.tables import diagnostics_table, evaluation_table

ACCURACY = {"accuracy": 0.75, "accuracy_low": 0.5, "accuracy_high": 1.0}


def printed(facts: dict[str, Any]) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(diagnostics_table(facts))
    return out.getvalue()


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-6.0, -6.0, "shorter by 6 tokens"),
        (-9.0, -6.0, "shorter by 6 to 9 tokens"),
        (-1.0, 0.0, "shorter by 0 to 1 token"),
        (-2.0, 1.0, "between 2 tokens shorter and 1 token longer"),
        (0.0, 0.0, "of the same length"),
        (0.0, 3.0, "longer by 0 to 3 tokens"),
        (2.0, 2.0, "longer by 2 tokens"),
    ],
)
def test_differences_in_length_are_in_words(low: float, high: float, words: str) -> None:
    group = {"from": low, "to": high, **ACCURACY}
    facts = {"pairs": 8, "baselines": {}, "log_loss": 0.5, "brier": 0.2, "calibration_error": 0.1, **ACCURACY}
    assert f"better response {words}  " in printed(facts | {"by_length_difference": [group]})


def test_ways_of_scoring_are_in_words() -> None:
    text = printed({"invariance": {"batched": 1e-7, "beside_a_long_row": 2e-7, "shared": 0.0}})
    assert "1e-07 in a microbatch of several, 2e-07 beside a long sequence, 0 after a shared prompt" in text


def shown(evaluation: dict[str, Any], width: int = 200) -> str:
    """What a terminal shows of an evaluation, with single spaces."""
    console = Console(width=width)
    with console.capture() as capture:
        console.print(evaluation_table(evaluation))
    return re.sub(r" +", " ", capture.get())


def test_the_models_are_side_by_side() -> None:
    policy = {"score_mean": 0.375, "score_gain": 0.25, "score_gain_low": -0.05, "score_gain_high": 0.55, "step": 40}
    accuracy = {"accuracy": 0.7012, "accuracy_low": 0.65, "accuracy_high": 0.75, "pairs": 1234}
    text = shown(
        {
            "reward_model": accuracy,
            "reference": {"score_mean": 0.125},
            "policy": policy,
            "best_of": {"n": 4, "score_mean": 0.875},
            "prompts": 64,
            "seconds": {"sft": 1.4, "ppo": 90.0},
        }
    )
    assert "accuracy 70.1% on 1,234 held-out pairs (95 % interval 65.0% to 75.0%)" in text
    assert re.search(r"reference policy best of 4 ?\n", text)
    assert "score, mean 0.125 0.375 0.875" in text
    assert "change of the score +0.250 (-0.050 to +0.550)" in text
    assert "time: sft 1 s ppo 90 s" in text
    assert "gold" not in text


def test_a_classifier_has_its_figures_with_intervals_and_a_row_per_class() -> None:
    own = {"rows": 20, "recall": 0.9, "recall_low": 0.7, "recall_high": 0.97}
    own |= {"f1": 0.5, "f1_low": 0.25, "f1_high": 0.75}
    figures = {"task": "classification", "rows": 1234, **ACCURACY, "by_class": {"[good]": own}}
    text = shown({"classifier": figures})
    assert "classification: 1,234 held-out rows, with 95 % intervals" in text
    assert "accuracy 75.0% (50.0% to 100.0%)" in text
    assert re.search(r"\[good\] 20 90.0% \(70.0% to 97.0%\) 0.500 \(0.250 to 0.750\)", text)
    many = {str(number): own for number in range(31)}
    assert "90.0%" not in shown({"classifier": figures | {"by_class": many}})


def test_a_regression_has_its_errors_and_correlations() -> None:
    figures: dict[str, Any] = {"task": "regression", "rows": 1}
    for name in ("rmse", "pearson"):
        figures |= {name: 0.5, f"{name}_low": 0.25, f"{name}_high": 0.75}
    text = shown({"classifier": figures})
    assert "regression: 1 held-out row, with 95 % intervals" in text
    assert "RMSE 0.5 (0.25 to 0.75)" in text
    assert "Pearson's r 0.500 (0.250 to 0.750)" in text


def test_a_run_without_an_evaluation_has_no_table() -> None:
    assert shown({}) == "time: nothing ran\n"


def test_an_evaluation_with_everything_fits_a_narrow_terminal() -> None:
    figures = {"score_mean": -10.5, "score_std": 1.25, "gold_mean": -10.5, "win_rate": 1.0, "gold_win_rate": 1.0}
    gains = {f"{name}_gain{end}": -12.345 for name in ("score", "gold") for end in ("", "_low", "_high")}
    gains |= {"kl_per_sequence": 12.5, "kl_per_token": 0.125, "step": 40}
    evaluation = {"reference": figures, "policy": figures | gains, "best_of": {"n": 16, **figures}, "prompts": 64}
    # A title, a heading, a line for each of the nine figures, and the times.
    assert len(shown(evaluation, width=80).splitlines()) == 12
