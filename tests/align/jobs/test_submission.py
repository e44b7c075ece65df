import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.thirdparty.pathspec import PathSpec

from align.config.load import load_experiment
from align.jobs.submission import (
    STOP_WAIT,
    JobOptions,
    RunOfJob,
    Submission,
    resumption_of,
    submission_of,
    with_secrets_hidden,
)
from policies.errors import UserError

EVERYTHING: dict[str, Any] = {
    "name": "all",
    "model": {"path": "base"},
    "data": {"prompts": ["a.jsonl", "b.jsonl"], "demonstrations": {"path": "a.jsonl"}, "preferences": "org/on-the-hub"},
    "sft": {"adapter": "table#task"},
    "reward": {
        "model": "reward",
        "terms": {
            "model": {"kind": "model"},
            "sentiment": {"kind": "classifier", "path": "base"},
            "rule": {"kind": "function", "function": "r.py:f"},
        },
    },
    "ppo": {"critic": {"model": "base", "kind": "model"}},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with models, data and a function in it."""
    work = tmp_path / "work"
    for name in ("base", "table", "reward", "runs"):
        (work / name).mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "r.py"):
        (work / name).touch()
    monkeypatch.chdir(work)
    return work


def write(file: Path, settings: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(settings))
    return file


def submit(file: Path, *overrides: str, gpus: int = 0, **options: Any) -> Submission:
    settings = load_experiment(file, overrides)
    return submission_of(settings, file, overrides, JobOptions(**options), cluster_gpus=gpus)


def line(submission: Submission) -> list[str]:
    return shlex.split(submission.entrypoint)


def test_the_command_is_the_users_with_paths_that_hold_in_another_folder(folder: Path) -> None:
    submission = submit(write(folder / "x.yaml", EVERYTHING), "seed=3", python="/env/bin/python")
    assert line(submission)[:7] == ["exec", "/env/bin/python", "-m", "align", "run", "x.yaml", "seed=3"]
    assert set(line(submission)[7:]) == {
        f"runs={folder}/runs",
        f'model.path="{folder}/base"',
        f'data.prompts.path=["{folder}/a.jsonl", "{folder}/b.jsonl"]',
        f'data.demonstrations.path="{folder}/a.jsonl"',
        f'sft.adapter="{folder}/table#task"',
        f'reward.model="{folder}/reward"',
        f'reward.terms.sentiment.path="{folder}/base"',
        f'ppo.critic.model="{folder}/base"',
    }
    assert submission.working_dir == str(folder)


def test_the_jobs_command_loads_the_same_experiment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(folder / "x.yaml", EVERYTHING | {"cluster": {"address": "10.0.0.1:6379"}})
    overrides = line(submit(file, "name=other"))[6:]
    here = load_experiment(file, overrides)
    monkeypatch.chdir("/")
    there = load_experiment(file, overrides)
    assert here == there
    assert there.cluster.address is None
    assert there.data.prompts is not None
    assert there.data.prompts.path == [f"{folder}/a.jsonl", f"{folder}/b.jsonl"]
    assert there.data.preferences is not None
    assert there.data.preferences.path == "org/on-the-hub"


def test_runs_data_and_models_are_not_sent(folder: Path) -> None:
    submission = submit(write(folder / "x.yaml", EVERYTHING), "runs=runs")
    assert set(submission.excludes) == {"/runs", "/base", "/table", "/reward", "/a.jsonl", "/b.jsonl"}
    inner = submit(write(folder / "x.yaml", {"name": "x", "model": {"path": "runs/x/base"}}))
    (folder / "runs/x/base").mkdir(parents=True)
    assert set(inner.excludes) == {"/runs"}
    assert submit(write(folder / "x.yaml", {"name": "x", "model": {"path": "/elsewhere"}})).excludes == ("/runs",)
    assert submit(write(folder / "x.yaml", {"name": "x", "model": {"path": "base"}, "runs": "."})).excludes == (
        "/base",
    )


def test_folders_behind_links_are_not_sent(folder: Path) -> None:
    outside = folder.parent / "storage"
    outside.mkdir()
    (folder / "linked").symlink_to(outside)
    (folder / "within").symlink_to(folder / "base")
    file = write(folder / "x.yaml", {"name": "x", "model": {"path": "within"}, "runs": "linked"})
    assert set(submit(file).excludes) == {"/linked", "/within", "/base"}


@pytest.mark.parametrize("name", ["[red]", "a*b", "a?b", "a b", "ünï", "!x", "a\\b", "a#b", "#a"])
def test_odd_names_are_not_sent(folder: Path, name: str) -> None:
    for each in (name, "r", "a-b"):
        (folder / each).mkdir()
    file = write(folder / "x.yaml", {"name": "x", "model": {"path": name}})
    left_out = PathSpec.from_lines("gitwildmatch", submit(file, "runs=/elsewhere").excludes)
    assert left_out.match_file(f"{name}/weights")
    assert not left_out.match_file("r/weights")
    assert not left_out.match_file("a-b/weights")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"reward": {"terms": {"rule": {"kind": "function", "function": "../r.py:f"}}}}, "reward.terms.rule.function"),
        ({"evaluation": {"gold": "../r.py:f"}}, "evaluation.gold"),
        ({"include": "../part.yaml"}, "include"),
        ({"model": {"path": "base", "chat_template": "../part.yaml"}}, "model.chat_template"),
    ],
)
def test_a_file_that_would_not_be_sent_is_refused(folder: Path, settings: dict[str, Any], what: str) -> None:
    (folder.parent / "r.py").write_text("def f(prompts, responses, columns): ...\n")
    write(folder.parent / "part.yaml", {"seed": 1})
    file = write(folder / "x.yaml", {"name": "x", "model": {"path": "base"}} | settings)
    with pytest.raises(UserError, match=rf"^{what}: \S+ is not within {folder}, the folder that is sent"):
        submit(file)
    with pytest.raises(UserError, match="the experiment: "):
        submit(write(folder.parent / "x.yaml", {"name": "x", "model": {"path": "base"}}))


@pytest.mark.parametrize(("grace", "seconds"), [(None, "3660"), (30, "90")])
def test_ray_waits_for_the_end_of_a_step_before_it_kills(folder: Path, grace: float | None, seconds: str) -> None:
    file = write(folder / "x.yaml", {"name": "x", "model": {"path": "base"}, "checkpoint": {"grace": grace}})
    assert submit(file).runtime_env["env_vars"] == {STOP_WAIT: seconds}
    own = submit(file, env={STOP_WAIT: "5"}, runtime_env={"env_vars": {"A": "1"}, "pip": ["x"]})
    assert own.runtime_env == {"env_vars": {STOP_WAIT: "5", "A": "1"}, "pip": ["x"]}


@pytest.mark.parametrize(
    ("overrides", "gpus", "expected"),
    [
        (["stages=[sft]", "data.demonstrations=a.jsonl"], 0, 0.0),
        (["stages=[sft]", "data.demonstrations=a.jsonl"], 8, 1.0),
        (["stages=[sft]", "data.demonstrations=a.jsonl", "sft.ranks=2"], 8, 0.0),
    ],
)
def test_the_controller_has_a_gpu_where_it_trains(
    folder: Path, overrides: list[str], gpus: int, expected: float
) -> None:
    file = write(folder / "x.yaml", {"name": "x", "model": {"path": "base"}})
    assert submit(file, *overrides, gpus=gpus).run.gpus == expected


def test_a_run_is_resumed_where_it_lies_with_the_same_environment(folder: Path) -> None:
    first = submit(write(folder / "x.yaml", EVERYTHING), env={"KEY": "secret"}, python="/env/bin/python", cpus=2)
    run = RunOfJob.of(json.loads(json.dumps(first.run.metadata)))
    assert run is not None
    assert RunOfJob.of({"other": "1"}) is None
    sent = {"working_dir": "gcs://package.zip", **first.runtime_env}
    second = resumption_of(run, sent, ["ppo.steps=9"])
    assert line(second) == ["exec", "/env/bin/python", "-m", "align", "resume", f"{folder}/runs/all", "ppo.steps=9"]
    assert second.runtime_env == first.runtime_env
    assert tuple(second.excludes) == first.excludes
    assert second.run.cpus == 2


def test_values_of_environment_variables_are_not_shown(folder: Path) -> None:
    file = write(folder / "x.yaml", {"name": "x", "model": {"path": "base"}})
    shown = with_secrets_hidden(submit(file, env={"KEY": "secret"}))
    assert "secret" not in repr(shown)
    assert shown.runtime_env["env_vars"] == {STOP_WAIT: "3660", "KEY": "…"}
