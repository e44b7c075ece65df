"""A resumed run must be made from what it was started with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from align.config.schema import Experiment
from align.data.datasets import Datasets
from align.runs.fingerprint import check_fingerprint, run_fingerprint, write_fingerprint
from align.runs.folder import RunFolder, locked
from align.stages.pipeline import load_datasets
from policies.errors import UserError
from policies.text.chat_templates import BUILT_IN
from tests.integration.tiny_run import make_settings


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    return make_settings(model, tmp_path)


def start_run(settings: dict[str, Any], tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    write_fingerprint(run, *experiment_and_data(settings))
    return run


def experiment_and_data(settings: dict[str, Any]) -> tuple[Experiment, Datasets]:
    experiment = Experiment.model_validate(settings)
    return experiment, load_datasets(experiment)


def test_duration_and_number_of_processes_may_change(settings: dict[str, Any], tmp_path: Path) -> None:
    run = start_run(settings, tmp_path)
    settings["ppo"]["steps"] = 9
    settings["rollouts"] |= {"workers": 1, "chunk_size": 4}
    settings["learner"]["ranks"] = 2
    settings["checkpoint"]["every"] = 2
    check_fingerprint(run, *experiment_and_data(settings))


def test_the_limits_of_a_function_may_change_but_not_its_fallback(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text("def f(p, r, c): return [0.0] * len(r)\n")
    term = {"kind": "function", "function": f"{tmp_path}/score.py:f", "timeout": 1}
    settings["reward"]["terms"] = {"own": term}
    run = start_run(settings, tmp_path)
    term |= {"timeout": 60, "processes": 2, "memory_gb": 3}
    check_fingerprint(run, *experiment_and_data(settings))
    term["fallback"] = 0
    with pytest.raises(UserError, match=r"was started with reward\.terms\.own\.fallback None, and it is 0\.0 now"):
        check_fingerprint(run, *experiment_and_data(settings))


def test_a_package_that_exits_when_it_is_imported_is_named(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "exiting_package").mkdir()
    (tmp_path / "exiting_package" / "__init__.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    experiment, datasets = experiment_and_data(settings)
    gold = experiment.evaluation.model_copy(update={"gold": "exiting_package.score:f"})
    experiment = experiment.model_copy(update={"evaluation": gold})
    with pytest.raises(UserError, match=r"gold: module exiting_package\.score cannot be imported: SystemExit: 3"):
        run_fingerprint(experiment, datasets)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("ppo", "epochs", 3), ("learner", "max_grad_norm", 0.5), ("rollouts", "temperature", 0.9), ("policy", "alpha", 8)],
)
def test_a_setting_that_changes_the_computation_is_refused_by_name(
    section: str, name: str, value: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    run = start_run(settings, tmp_path)
    settings[section] |= {name: value}
    with pytest.raises(UserError, match=rf"was started with {section}\.{name} .* and it is {value}"):
        check_fingerprint(run, *experiment_and_data(settings))


def test_another_base_model_is_refused_and_the_same_one_elsewhere_is_not(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    run = start_run(settings, tmp_path)
    moved = tmp_path / "moved"
    shutil.copytree(settings["model"]["path"], moved)
    settings["model"]["path"] = str(moved)
    check_fingerprint(run, *experiment_and_data(settings))
    weights = load_file(moved / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-6
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.path: .*moved is not the model"):
        check_fingerprint(run, *experiment_and_data(settings))


@pytest.mark.parametrize("source", ["demonstrations", "preferences", "prompts"])
def test_other_data_is_refused_by_source(source: str, settings: dict[str, Any], tmp_path: Path) -> None:
    run = start_run(settings, tmp_path)
    path = Path(settings["data"][source])
    lines = path.read_text().splitlines()
    row = json.loads(lines[0])
    path.write_text("\n".join([*lines[1:], json.dumps(row | {"prompt": row["prompt"] + " red"})]) + "\n")
    with pytest.raises(UserError, match=rf"data\.{source}\S*: the rows"):
        check_fingerprint(run, *experiment_and_data(settings))


def test_only_one_process_writes_a_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with locked(run), pytest.raises(UserError, match=r"is being written by process \d+"), locked(run):
        pass
    with locked(run):
        pass


def test_another_chat_template_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(BUILT_IN["plain"])
    settings["model"]["chat_template"] = str(file)
    run = start_run(settings, tmp_path)
    check_fingerprint(run, *experiment_and_data(settings))
    file.write_text(BUILT_IN["plain"] + "{# another version #}")
    with pytest.raises(UserError, match=r"^model\.chat_template: .*template\.jinja has changed since"):
        check_fingerprint(run, *experiment_and_data(settings))
    settings["model"]["chat_template"] = None
    with pytest.raises(UserError, match=r"was started with model\.chat_template"):
        check_fingerprint(run, *experiment_and_data(settings))


USER_FUNCTIONS = """
import torch
from align.config.estimators import advantage_estimator

@advantage_estimator(reads=("gamma",))
def estimator(batch):
    return [torch.zeros(len(rewards)) for rewards in batch.rewards], batch.values

def policy_loss(logprobs, old_logprobs, advantages, ppo):
    return -advantages * torch.exp(logprobs - old_logprobs), torch.zeros_like(logprobs)

def score(prompts, responses, columns):
    return [0.0] * len(responses)
"""


@pytest.mark.slow
@pytest.mark.parametrize("key", ["ppo.estimator", "ppo.policy_loss", "reward.terms.own.function", "evaluation.gold"])
def test_a_changed_function_of_the_users_is_refused_by_name(key: str, settings: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / f"{key.replace('.', '_')}.py"
    file.write_text(USER_FUNCTIONS)
    function = {"ppo.estimator": "estimator", "ppo.policy_loss": "policy_loss"}.get(key, "score")
    section, name = key.split(".")[:2]
    value: Any = f"{file}:{function}"
    if section == "reward":
        value = {"own": {"kind": "function", "function": value}}
    settings[section] |= {name: value}
    run = start_run(settings, tmp_path)
    check_fingerprint(run, *experiment_and_data(settings))
    file.write_text(USER_FUNCTIONS + "\n# another version\n")
    with pytest.raises(UserError, match=rf"^{key}: .*{file.name} has changed since"):
        check_fingerprint(run, *experiment_and_data(settings))
