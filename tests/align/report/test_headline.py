import json
from pathlib import Path

import pytest

from align.report.headline import sentence, tiles
from tests.align.report.runs import EVALUATION, POLICY, REFERENCE, SETTINGS, record, step


def test_a_change_whose_interval_holds_zero_is_not_called_one(tmp_path: Path) -> None:
    policy = POLICY | {"score_gain_low": -0.1}
    said = sentence(record(tmp_path, **EVALUATION | {"policy": policy}))
    assert said.startswith("After 40 steps of PPO, the score is not clearly different from the SFT model's")


def test_the_gold_score_counts_where_there_is_one(tmp_path: Path) -> None:
    policy = POLICY | {
        "gold_mean": 1.0,
        "gold_win_rate": 0.25,
        "gold_gain": -1,
        "gold_gain_low": -2,
        "gold_gain_high": -0.5,
    }
    run = record(tmp_path, reference=REFERENCE | {"gold_mean": 2.0}, policy=policy, prompts=64)
    assert sentence(run).startswith("PPO lowered the gold score by 1 over")
    change, _, wins, _ = tiles(run)
    assert (change.label, change.value) == ("Change of the gold score", "-1")
    assert (wins.value, wins.details[1:]) == ("25%", ("of 64 prompts, by gold score", "62% by score"))


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ([], "The run has logged nothing yet."),
        ([{"stage": "sft", "step": 1, "sft/loss": 1.0}], "PPO has not begun; the stage sft has logged 1 step."),
        ([step(3, reward__mean=0.5)], "PPO has not ended: it is at step 3, where the mean score is 0.5."),
        ([step(3, reward__mean=None)], "PPO has not ended: it is at step 3."),
    ],
)
def test_a_run_without_an_evaluation_says_how_far_it_is(
    tmp_path: Path, metrics: list[dict[str, float]], said: str
) -> None:
    assert sentence(record(tmp_path, metrics)) == said


def test_there_are_always_four_tiles(tmp_path: Path) -> None:
    assert [tile.value for tile in tiles(record(tmp_path))] == ["–"] * 4
    run = record(tmp_path, [step(1, reward__mean=0.5, kl__per_sequence=2.0, eval__win_rate=0.75)])
    assert [tile.value for tile in tiles(run)] == ["–", "2", "75%", "–"]


def test_the_accuracy_is_beside_its_ceiling_and_the_length_alone(tmp_path: Path) -> None:
    (tmp_path / "reward").mkdir()
    accuracy = {"accuracy": 0.8, "accuracy_low": 0.7, "accuracy_high": 0.9}
    facts = accuracy | {"ceiling": 0.95, "baselines": {"longer": {"accuracy": 0.6}}}
    (tmp_path / "reward" / "diagnostics.json").write_text(json.dumps(facts))
    tile = tiles(record(tmp_path))[3]
    assert tile.value == "80%"
    assert tile.details == (
        "95% interval 70% to 90%",
        "at most 95%, as certain as the labels are",
        "60% by length alone",
    )


def test_an_extended_run_says_at_which_step_it_was_evaluated(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(SETTINGS.format(name="a", beta=0.05).replace("steps: 40", "steps: 80"))
    run = record(tmp_path, [step(40, reward__mean=0.5), step(47, reward__mean=0.75)], **EVALUATION)
    assert sentence(run) == (
        "PPO raised the score by 0.25 over the SFT model in 40 steps, at a KL of 3 nats per sequence. "
        "It has been extended since: it is at step 47 of 80, where the mean score is 0.75."
    )
    assert [tile.details[-1] == "evaluated at step 40" for tile in tiles(run)] == [True, True, True, False]


@pytest.mark.parametrize(("last", "is_done"), [(40, False), (47, True)])
def test_a_run_whose_evaluation_is_of_its_end_is_not_called_extended(tmp_path: Path, last: int, is_done: bool) -> None:
    if is_done:  # the policy that PPO ends with may be that of an earlier step
        (tmp_path / "policy").mkdir()
    run = record(tmp_path, [step(last, reward__mean=0.5)], **EVALUATION)
    assert sentence(run).endswith("at a KL of 3 nats per sequence.")
    assert "evaluated at step 40" not in str(tiles(run))
