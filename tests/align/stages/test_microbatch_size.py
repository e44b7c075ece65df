from pathlib import Path

import pytest
from pydantic import TypeAdapter

from align.config.load import load_experiment
from align.config.schema import Experiment
from align.config.stage import all_stages
from align.runs.folder import RunFolder, begin_run, folder_of
from align.runtime.failures import Fault, MicrobatchTooLarge
from align.stages.microbatch_size import halve_size, keep_size, setting_of


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return TypeAdapter(Experiment).validate_python(
        {"name": "tiny", "runs": str(tmp_path), "model": {"path": "tiny"}, "data": {"prompts": "prompts.jsonl"}}
    )


@pytest.fixture
def run(experiment: Experiment) -> RunFolder:
    folder = folder_of(experiment)
    begin_run(folder, experiment)
    return folder


def too_large(tokens: int, sequences: int = 4) -> MicrobatchTooLarge:
    return MicrobatchTooLarge(0, tokens, sequences, "out of memory")


def test_every_stage_that_trains_has_the_setting(experiment: Experiment) -> None:
    names = [setting_of(stage.name) for stage in all_stages()]
    sections = ["sft", "classify", "reward", "dpo", "learner"]
    assert names == [f"{section}.tokens_per_microbatch" for section in sections]


def test_the_size_is_kept_in_the_configuration_and_nothing_else_changes(experiment: Experiment, run: RunFolder) -> None:
    keep_size(run, "ppo", 2048)
    learner = experiment.learner.model_copy(update={"tokens_per_microbatch": 2048})
    assert load_experiment(run.config) == experiment.model_copy(update={"learner": learner})


def test_a_size_that_is_kept_already_is_not_written_again(run: RunFolder) -> None:
    keep_size(run, "sft", 2048)
    before = run.config.stat().st_mtime_ns
    keep_size(run, "sft", 2048)
    assert run.config.stat().st_mtime_ns == before


@pytest.mark.parametrize(("tokens", "expected"), [(2048, 1024), (1025, 1024), (1024, 512), (700, 512), (2, 1)])
def test_it_is_halved_until_such_a_microbatch_is_divided(tokens: int, expected: int, run: RunFolder) -> None:
    keep_size(run, "sft", 2048)
    assert halve_size(run, "sft", too_large(tokens)) == expected
    assert load_experiment(run.config).sft.tokens_per_microbatch == expected


def test_a_single_sequence_cannot_be_divided(run: RunFolder) -> None:
    keep_size(run, "ppo", 2048)
    with pytest.raises(Fault, match=r"in 1 sequence: out of memory\. A sequence cannot be divided"):
        halve_size(run, "ppo", too_large(3000, sequences=1))
    assert load_experiment(run.config).learner.tokens_per_microbatch == 2048
