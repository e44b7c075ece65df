"""The products of a run that are exported."""

from pathlib import Path

import pytest

from align.config.schema import Experiment
from align.outputs.artifacts import reward_folder
from align.runs.folder import RunFolder
from policies.errors import UserError
from tests.integration.tiny_run import make_settings


def test_a_single_reward_model_has_one_member(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    experiment = Experiment.model_validate(make_settings(tmp_path, tmp_path))
    run.reward.mkdir()
    assert reward_folder(experiment, run, None) == reward_folder(experiment, run, 0)
    with pytest.raises(UserError, match=r"--member 3: .*reward has one member, 0"):
        reward_folder(experiment, run, 3)
