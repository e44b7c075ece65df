import pytest
import torch

from align.config.schema import Experiment
from align.resources.ray_cluster import compute_settings, cores
from policies.device import ComputeSettings


@pytest.mark.parametrize(
    ("settings", "processes", "expected"),
    [
        ({}, 1, ComputeSettings(cores(), not torch.cuda.is_available())),
        ({"deterministic": False}, cores(), ComputeSettings(1, False)),
        ({"deterministic": True, "cluster": {"threads": 3}}, 2, ComputeSettings(3, True)),
    ],
)
def test_processes_share_the_cores_and_compute_as_the_experiment_says(
    settings: dict[str, object], processes: int, expected: ComputeSettings
) -> None:
    experiment = Experiment.model_validate({"name": "x", "model": {"path": "x"}} | settings)
    assert compute_settings(experiment, processes) == expected
