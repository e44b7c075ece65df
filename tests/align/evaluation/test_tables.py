"""Tables in the terminal name things in words."""

import io
from typing import Any

import pytest
from rich.console import Console

from align.evaluation.tables import diagnostics_table

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
