from align.resources.actors import RANK, WORKER
from align.resources.peak_memory import PeakMemory, beside_plan
from align.resources.tensor_uses import TensorUse

USES = [
    TensorUse("sft", "learner", "base model", 70.0),
    TensorUse("sft", "learner", "activations", 30.0, transient=True),
    TensorUse("reward", "each of 2 ranks", "base model", 200.0),
    TensorUse("reward", "evaluation", "base model", 300.0),
    TensorUse("ppo", "each of 2 ranks", "base model", 400.0),
    TensorUse("ppo", "each of 4 workers", "base model", 500.0),
]


def test_the_highest_peak_of_a_kind_counts() -> None:
    peaks = PeakMemory()
    for peak in (5, 9, None, 7):
        peaks.note(WORKER, peak)
    peaks.note(RANK, None)
    by_kind = peaks.by_kind()
    assert by_kind.keys() == {"controller", WORKER}
    assert by_kind[WORKER] == 9


def test_processes_are_set_beside_those_of_the_plan() -> None:
    peaks = {
        "sft": {"controller": 1},
        "reward": {"controller": 2, RANK: 3},
        "ppo": {"controller": 4, RANK: 5, WORKER: 6},
    }
    assert beside_plan(USES, peaks) == [
        ("sft", "learner", 100.0, 1),
        ("reward", "each of 2 ranks", 200.0, 3),
        ("reward", "evaluation", 300.0, 2),
        ("ppo", "each of 2 ranks", 400.0, 5),
        ("ppo", "each of 4 workers", 500.0, 6),
    ]


def test_what_was_not_measured_is_left_out() -> None:
    assert beside_plan(USES, {"ppo": {RANK: 5}}) == [("ppo", "each of 2 ranks", 400.0, 5)]
