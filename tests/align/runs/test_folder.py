from itertools import chain
from pathlib import Path

import pytest

from align.config.ppo_settings import KlSettings, PpoSettings
from align.config.schema import Experiment
from align.config.stage import stage_names
from align.runs.folder import (
    RunFolder,
    begin_run,
    find_run,
    folder_of,
    locked,
    read_facts,
    refuse_run,
    refuse_stage,
    write_facts,
)
from policies.errors import UserError

PARTS = {
    "sft": ("sft/adapter", "checkpoints/sft/step-1/state"),
    "classify": ("classifier/adapter", "checkpoints/classify/step-1/state"),
    "reward": ("reward/adapter", "checkpoints/reward/step-1/state"),
    "dpo": ("dpo/adapter", "checkpoints/dpo/step-1/state"),
    "ppo": ("policy/adapter", "best/adapter", "checkpoints/ppo/step-1/state"),
}
SHARED = ("metrics.jsonl", "samples.jsonl", "wandb/id")
DERIVED = ("evaluation.json", "report/index.html")
FOREIGN = ("notes.md", "my/plot.png")


def make(runs: Path, name: str = "tiny") -> Experiment:
    return Experiment.model_validate({"name": name, "runs": str(runs), "model": {"path": "m"}})


def fill(run: RunFolder) -> None:
    """Write what a complete run leaves, with files of the user among it."""
    for name in chain(*PARTS.values(), SHARED, DERIVED, FOREIGN):
        path = run.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")


def files(run: RunFolder) -> set[str]:
    return {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}


def test_a_run_is_in_a_folder_of_its_name(tmp_path: Path) -> None:
    assert folder_of(make(tmp_path, "a.b-c")).path == tmp_path / "a.b-c"


def test_runs_that_cannot_hold_a_folder_are_refused_with_their_key(tmp_path: Path) -> None:
    file = tmp_path / "base.yaml"
    file.touch()
    with pytest.raises(UserError, match=rf"^runs: {file}/tiny cannot be made, because {file} is not a folder"):
        folder_of(make(file))
    with pytest.raises(UserError, match=r"^runs: .* cannot be written: File name too long"):
        folder_of(make(tmp_path / ("x" * 300)))
    with (
        pytest.raises(UserError, match=r"^runs: /proc/x/tiny cannot be written: No such file or directory"),
        locked(RunFolder(Path("/proc/x/tiny"))),
    ):
        pass


def test_starting_writes_the_settings(tmp_path: Path) -> None:
    experiment = make(tmp_path)
    begin_run(folder_of(experiment), experiment)
    assert find_run(str(tmp_path / "tiny")) == (folder_of(experiment), experiment)


def test_starting_again_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    run = folder_of(make(tmp_path))
    fill(run)
    begin_run(run, make(tmp_path))
    assert files(run) == {*FOREIGN, "config.yaml"}


@pytest.mark.parametrize("stage", stage_names())
def test_starting_a_stage_again_leaves_the_others(tmp_path: Path, stage: str) -> None:
    run = folder_of(make(tmp_path))
    fill(run)
    before = files(run)
    begin_run(run, make(tmp_path), [stage])
    assert files(run) == before - {*PARTS[stage], *DERIVED} | {"config.yaml"}


@pytest.mark.parametrize(("stage", "product"), [("sft", "sft"), ("reward", "reward"), ("ppo", "policy")])
def test_a_stage_is_done_when_its_product_exists(tmp_path: Path, stage: str, product: str) -> None:
    run = RunFolder(tmp_path)
    run.checkpoints(stage).mkdir(parents=True)
    assert not run.done(stage)
    (tmp_path / product).mkdir()
    assert [each for each in stage_names() if run.done(each)] == [stage]


def test_a_best_policy_does_not_make_ppo_done(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.best.mkdir()
    assert not run.done("ppo")


def test_only_a_folder_with_a_run_is_refused(tmp_path: Path) -> None:
    run = folder_of(make(tmp_path))
    run.path.mkdir()
    refuse_run(run)
    begin_run(run, make(tmp_path))
    with pytest.raises(UserError, match=f"{run.path} holds a run: `align resume {run.path}`"):
        refuse_run(run)


@pytest.mark.parametrize(("stage", "done"), [("sft", "sft"), ("sft", "ppo"), ("reward", "ppo"), ("ppo", "ppo")])
def test_a_stage_is_refused_where_it_or_a_later_one_is_done(tmp_path: Path, stage: str, done: str) -> None:
    (tmp_path / {"sft": "sft", "ppo": "policy"}[done]).mkdir()
    with pytest.raises(UserError, match=f"stage {done} is done; --replace runs {stage} again"):
        refuse_stage(RunFolder(tmp_path), stage)


def test_a_stage_is_not_refused_where_only_earlier_ones_are_done(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.sft.mkdir()
    run.reward.mkdir()
    refuse_stage(run, "ppo")


def test_a_run_is_found_by_its_name_and_by_its_folder(tmp_path: Path) -> None:
    experiment = make(tmp_path / "runs")
    begin_run(folder_of(experiment), experiment)
    assert find_run("tiny", str(tmp_path / "runs")) == find_run(str(tmp_path / "runs" / "tiny"))


def test_overrides_of_a_run_remove_keys_and_replace_sections(tmp_path: Path) -> None:
    experiment = Experiment.model_validate(
        {"name": "tiny", "model": {"path": "m"}, "runs": str(tmp_path), "ppo": {"steps": 7, "kl": {"coefficient": 0.2}}}
    )
    begin_run(folder_of(experiment), experiment, stage_names())
    _, resumed = find_run("tiny", str(tmp_path), ["~ppo.kl.coefficient", "ppo.steps=9"])
    assert (resumed.ppo.steps, resumed.ppo.kl.coefficient) == (9, KlSettings().coefficient)
    _, resumed = find_run("tiny", str(tmp_path), ["ppo:={steps: 9}"])
    assert resumed.ppo == PpoSettings(steps=9)
    with pytest.raises(UserError, match=r"^override '~ppo\.klx': nothing to remove: ppo\.klx is not set; did you mean"):
        find_run("tiny", str(tmp_path), ["~ppo.klx"])


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    with pytest.raises(UserError, match=f"tiny is not a run: there is no tiny/config.yaml and no {tmp_path}/tiny/con"):
        find_run("tiny", str(tmp_path))
    with pytest.raises(UserError, match=f"is not a run: there is no {tmp_path}/tiny/config.yaml$"):
        find_run(str(tmp_path / "tiny"))


def test_facts_and_evaluation_are_read_back_and_are_empty_before(tmp_path: Path) -> None:
    assert read_facts(tmp_path) == RunFolder(tmp_path).read_evaluation() == {}
    write_facts(tmp_path, {"seconds": 1.5})
    RunFolder(tmp_path).evaluation.write_text('{"prompts": 4}')
    assert read_facts(tmp_path) == {"seconds": 1.5}
    assert RunFolder(tmp_path).read_evaluation() == {"prompts": 4}


def test_a_run_in_the_folder_of_a_ray_jobs_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_1"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    settings = {"name": "x", "model": {"path": "base"}}
    with pytest.raises(UserError, match=r"^runs: .*/_ray_pkg_1/runs/x would be in the folder in which Ray keeps"):
        folder_of(Experiment.model_validate(settings))
    folder_of(Experiment.model_validate(settings | {"runs": str(tmp_path / "runs")}))
