"""A real run whose checkpoints are damaged."""

from pathlib import Path

import pytest

from tests.integration.tiny_run import make_settings, run_in_process


@pytest.fixture(scope="session")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run through all stages, with two checkpoints of each."""
    return run_in_process(make_settings(tiny_model, tmp_path_factory.mktemp("finished")))
