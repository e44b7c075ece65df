"""The products of a run that are exported."""

from pathlib import Path

import pytest

from align.outputs.artifacts import reward_folder
from align.runs.folder import RunFolder
from policies.errors import UserError


def test_a_single_reward_model_has_one_member(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.reward.mkdir()
    assert reward_folder(run, None) == reward_folder(run, 0)
    with pytest.raises(UserError, match=r"--member 3: .*reward has one member, 0"):
        reward_folder(run, 3)
