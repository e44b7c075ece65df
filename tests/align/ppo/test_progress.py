import json
from dataclasses import asdict
from pathlib import Path

import pytest

from align.ppo.checkpoint import PpoProgress, read_progress
from policies.errors import UserError

PROGRESS = PpoProgress(
    step=3,
    kl_coefficient=0.05,
    best_step=2,
    best=1.5,
    reward={},
    stop=[],
    stopped=None,
    seconds=4.0,
    ranks=0,
    zero=0,
    pending=[],
    products={},
    logit_spacing=0.125,
)


def read(folder: Path, **changes: object) -> PpoProgress:
    state = {name: value for name, value in (asdict(PROGRESS) | changes).items() if value != "missing"}
    (folder / "state.json").write_text(json.dumps(state))
    return read_progress(folder, {})


def test_the_unit_of_the_mismatch_is_that_of_the_uninterrupted_run(tmp_path: Path) -> None:
    assert read(tmp_path) == PROGRESS


def test_a_checkpoint_without_the_unit_is_read_and_the_unit_measured_anew(tmp_path: Path) -> None:
    assert read(tmp_path, logit_spacing="missing").logit_spacing is None


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_a_unit_that_is_not_positive_is_refused(tmp_path: Path, bad: float) -> None:
    with pytest.raises(UserError, match="logit_spacing"):
        read(tmp_path, logit_spacing=bad)
