from typing import Any

import pytest

from align.config.schema import Experiment
from align.stages.ppo_record import shows_samples


def shown_steps(tracking: dict[str, Any], every: int) -> list[int]:
    """The steps of ten whose samples W&B shows."""
    experiment = Experiment.model_validate(
        {
            "name": "tiny",
            "model": {"path": "tiny"},
            "data": {"prompts": "prompts.jsonl"},
            "ppo": {"steps": 10},
            "evaluation": {"every": every},
            "tracking": tracking,
        }
    )
    return [number for number in range(1, 11) if shows_samples(experiment, number)]


@pytest.mark.parametrize(
    ("tracking", "every", "expected"),
    [
        ({"samples_every": 4}, 0, [4, 8, 10]),
        ({"samples_every": 4}, 5, [4, 5, 8, 10]),
        ({"samples_every": 1}, 0, list(range(1, 11))),
        ({"samples_every": 1, "texts": False}, 5, []),
    ],
)
def test_samples_are_shown_at_evaluations_and_every_so_many_steps(
    tracking: dict[str, Any], every: int, expected: list[int]
) -> None:
    assert shown_steps(tracking, every) == expected
