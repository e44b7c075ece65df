"""A real run, whose files the tests copy and damage."""

from pathlib import Path

import pytest

from tests.integration.tiny_run import make_settings, run_in_process


@pytest.fixture(scope="session")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run, with two checkpoints of each stage."""
    return run_in_process(make_settings(tiny_model, tmp_path_factory.mktemp("finished")))
