"""Complete runs on a tiny model."""

import json
import math
import re
import signal
import subprocess
import time
from itertools import product
from pathlib import Path
from shutil import copytree
from typing import Any

import psutil
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.cli import main
from align.config.load import load_experiment
from align.config.schema import Experiment
from align.runs.fingerprint import write_fingerprint
from align.runs.folder import RunFolder, folder_of
from align.runtime.signals import StopRequest
from align.stages.pipeline import load_datasets, reopen, run_stages
from tests.integration.conftest import Command
from tests.integration.tiny_run import COMMAND, ENVIRONMENT, figures, run_in_process

DOCUMENTED = {
    *("score_mean", "score_std", "length_mean", "distinct_2", "eos_share", "win_rate"),
    *("kl_per_sequence", "kl_per_token", "step"),
    *("score_gain", "score_gain_low", "score_gain_high"),
}
OF_THE_POLICY = {name for name in DOCUMENTED if name.startswith(("kl_", "score_gain"))} | {"win_rate", "step"}


def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run the command in this process. Gives its exit status and what it wrote to standard error."""
    monkeypatch.setattr("sys.argv", ["align", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), capfd.readouterr().err


def test_every_stage_leaves_its_product(finished: Path) -> None:
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert adapter <= {file.name for file in (finished / "sft").iterdir()}
    assert {*adapter, "head.safetensors"} <= {file.name for file in (finished / "reward").iterdir()}
    assert adapter <= {file.name for file in (finished / "policy").iterdir()}
    assert not [file for file in finished.rglob(".*") if file.name.endswith((".writing", ".old"))]


def test_the_evaluation_has_the_documented_keys(finished: Path) -> None:
    from align.runs.folder import RunFolder

    evaluation = RunFolder(finished).read_evaluation()
    assert evaluation["reward_model"].keys() == {"accuracy", "accuracy_low", "accuracy_high", "pairs"}
    assert evaluation["policy"].keys() == DOCUMENTED
    assert evaluation["reference"].keys() == DOCUMENTED - OF_THE_POLICY
    assert evaluation["prompts"] == 4
    assert evaluation["seconds"].keys() == {"sft", "reward", "ppo"}


def test_every_step_is_logged_once(finished: Path) -> None:
    rows = figures(finished)
    trained = [(row["stage"], row["step"]) for row in rows if any(name.endswith("/loss") for name in row)]
    assert trained == list(product(("sft", "reward", "ppo"), (1, 2, 3)))
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))


def test_the_number_of_optimizer_steps_is_epochs_times_minibatches(finished: Path) -> None:
    assert [row["learner/optimizer_steps"] for row in figures(finished) if "policy/loss" in row] == [4, 4, 4]


def test_the_first_step_is_on_policy(finished: Path) -> None:
    first = next(row for row in figures(finished) if row["stage"] == "ppo")
    assert first["kl/per_sequence"] == pytest.approx(0, abs=1e-5)
    assert first["rollout/mismatch_max"] < 1e-4


def test_the_same_seed_gives_the_same_run(finished: Path, settings: dict[str, Any]) -> None:
    again = run_in_process(settings | {"tracking": {"wandb": "offline"}})
    assert figures(again) == figures(finished)
    assert any((again / "wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_a_stopped_run_resumes_as_if_it_had_not_been_stopped(
    finished: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Stopped by Ctrl-C in each stage in turn, and resumed each time."""
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(settings))
    run = tmp_path / "runs" / "tiny"
    line = ("run", str(path))
    for stage in ("sft", "reward", "ppo"):
        status, errors = interrupted(line, run, stage, tmp_path)
        assert status == 130, errors
        assert "Traceback" not in errors
        assert f"align resume {run}" in errors
        line = ("resume", str(run))
    done = subprocess.run([*COMMAND, *line], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert figures(run) == figures(finished)
    resumed = json.loads((run / "evaluation.json").read_text())
    uninterrupted = json.loads((finished / "evaluation.json").read_text())
    assert resumed | {"seconds": {}} == uninterrupted | {"seconds": {}}


def test_a_finished_run_continues_for_more_steps(settings: dict[str, Any], tmp_path: Path) -> None:
    more_steps = settings["ppo"] | {"steps": 5}
    uninterrupted = run_in_process(settings | {"name": "uninterrupted", "ppo": more_steps})
    run_in_process(settings)
    experiment = Experiment.model_validate(settings | {"ppo": more_steps})
    folder = folder_of(experiment)
    reopen(experiment, folder)
    run_stages(experiment, folder, load_datasets(experiment), StopRequest())
    assert figures(folder.path) == figures(uninterrupted)
    assert (folder.policy / "evaluation.json").read_bytes() == (
        uninterrupted / "policy" / "evaluation.json"
    ).read_bytes()


def interrupted(line: tuple[str, ...], run: Path, stage: str, folder: Path) -> tuple[int, str]:
    """Start the command and press Ctrl-C once a step of the stage is logged."""
    process = subprocess.Popen([*COMMAND, *line], cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    started = time.monotonic()
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and f'"stage": "{stage}"' in metrics.read_text()):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() - started < 150
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.slow
def test_generate_responds_and_repeats_itself(finished: Path, align: Command) -> None:
    line = ("generate", finished, "--prompt", "User: two?", "--prompt", "User: red?", "--seed", "3")
    first = align(*line)
    assert first.returncode == 0, first.stderr
    assert first.stdout
    assert first.stdout == align(*line).stdout


@pytest.mark.slow
def test_an_exported_model_continues_as_the_policy_does(finished: Path, align: Command, tmp_path: Path) -> None:
    done = align("export", finished, "--merge", "--to", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("User: name a colour. Assistant:", return_tensors="pt")["input_ids"]
    ours = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, ids.shape[1] :]
    said = align(
        "generate", finished, "--prompt", "User: name a colour. Assistant:", "--temperature", 0, "--max-new-tokens", 12
    )
    assert said.stdout.rstrip("\n") == tokenizer.decode(ours, skip_special_tokens=True).rstrip("\n")


def test_the_report_has_its_figures(finished: Path, align: Command) -> None:
    done = align("report", finished)
    assert done.returncode == 0, done.stderr
    page = (finished / "report" / "index.html").read_text()
    figures = re.findall(r'<figure id="figure-([^"]+)"', page)
    assert {"score", "kl", "length", "policy-loss", "value-loss", "sft-loss", "reward-model-loss"} <= set(figures)
    assert page.count('<svg class="chart"') == len(figures)
    assert f"align run {finished}/config.yaml" in page


def test_eval_reproduces_the_runs_evaluation(finished: Path, align: Command) -> None:
    before = json.loads((finished / "evaluation.json").read_text())
    done = align("eval", finished, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads((finished / "evaluation.json").read_text()) == before
    assert json.loads(done.stdout) == before


def test_a_run_is_not_overwritten_unless_asked(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    status, errors = call(monkeypatch, capfd, "run", finished / "config.yaml")
    assert (status, "holds a run" in errors, "Traceback" in errors) == (2, True, False)


def test_a_ready_made_adapter_and_reward_model_are_used_as_they_are(finished: Path, settings: dict[str, Any]) -> None:
    ready_made = {"sft": {"adapter": str(finished / "sft")}, "reward": {"model": str(finished / "reward")}}
    run = run_in_process(settings | ready_made | {"stages": ["ppo"]})
    for name in ("sft", "reward"):
        weights = "adapter_model.safetensors"
        assert (run / name / weights).read_bytes() == (finished / name / weights).read_bytes()
    ours = [row for row in figures(run) if row["stage"] == "ppo"]
    assert ours == [row for row in figures(finished) if row["stage"] == "ppo"]


def test_the_reward_model_is_evaluated_on_other_preferences(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "User: two Assistant:", "chosen": f" {i}.", "rejected": f" {i} red dog."} for i in range(9)]
    data = tmp_path / "more.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["align", "eval", str(finished), "--reward", "--data", str(data)]
    said = []
    for option in (["--json"], ["--to", str(tmp_path / "out")]):
        monkeypatch.setattr("sys.argv", arguments + option)
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        said.append(capfd.readouterr().out)
    assert json.loads(said[0])["pairs"] == 9
    assert "of 9 comparisons" in " ".join(said[1].split())
    assert json.loads((tmp_path / "out" / "diagnostics.json").read_text())["pairs"] == 9


def test_a_mistake_in_the_option_data_names_the_option(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    status, said = call(monkeypatch, capfd, "eval", finished, "--reward", "--data", "nowhere.jsonl")
    assert (status, said.strip()) == (2, "error: --data: nowhere.jsonl does not exist")


def test_resuming_a_finished_run_says_that_it_is_done(finished: Path, align: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    copytree(finished, run)
    experiment = load_experiment(run / "config.yaml")
    write_fingerprint(RunFolder(run), experiment, load_datasets(experiment))
    resumed = align("resume", run)
    assert resumed.returncode == 0, resumed.stderr
    assert f"nothing to resume: all {experiment.ppo.steps} steps are done" in resumed.stdout


@pytest.mark.parametrize("option", ["--data", "--classifier", "--to"])
def test_options_of_the_reward_models_evaluation_are_refused_without_it(
    option: str, finished: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    status, said = call(monkeypatch, capfd, "eval", finished, option, "x")
    assert (status, "need --reward: add it" in said) == (2, True)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "wrong key": ({"ppo": {"stepz": 3}}, "experiment.yaml:.*ppo.stepz: unknown key; did you mean steps"),
    "missing file": (
        {"data": {"demonstrations": "nowhere.jsonl"}},
        "data.demonstrations: nowhere.jsonl does not exist",
    ),
    "empty file": ({"data": {"prompts": "empty.jsonl"}}, "data.prompts: empty.jsonl has no rows"),
    "no tokenizer": ({"model": {"path": "bare"}}, "bare has no tokenizer"),
    "no chosen": ({"data": {"preferences": "rows.jsonl"}}, "data.preferences: rows.jsonl:2: neither `chosen` and"),
    "no source": ({"data": {"prompts": None}}, "data.prompts is not set"),
    "long prompt": ({"rollouts": {"max_prompt_tokens": 2}}, "tokens are more than rollouts.max_prompt_tokens, 2"),
    "no adapter": ({"sft": {"adapter": "nowhere"}}, "nowhere"),
    "no gold": ({"evaluation": {"gold": "nowhere.py:f"}}, "evaluation.gold: file nowhere.py does not exist"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_reported_in_one_message(
    mistake: str,
    settings: dict[str, Any],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n{"prompt": "p"}\n')
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    changes, expected = MISTAKES[mistake]
    for section, values in changes.items():
        settings[section] = settings[section] | values
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(settings))
    status, errors = call(monkeypatch, capfd, "run", "experiment.yaml")
    assert status == 2
    assert re.search(expected, " ".join(errors.split())), errors
    assert "Traceback" not in errors
    assert not (tmp_path / "runs").exists()


def test_gradients_that_are_not_finite_stop_the_run_and_their_batch_is_kept(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The reward is near the largest float, so its gradient overflows."""
    (tmp_path / "huge.py").write_text("def huge(prompts, responses, columns):\n    return [3e38] * len(responses)\n")
    settings["reward"] = {"terms": {"huge": {"kind": "function", "function": f"{tmp_path}/huge.py:huge"}}}
    settings["stages"] = ["sft", "ppo"]
    settings["learner"] |= {"max_skipped": 2}
    settings["ppo"] |= {"whiten_advantages": False, "critic": {"value_clip": None}}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(settings))
    status, errors = call(monkeypatch, capfd, "run", tmp_path / "experiment.yaml")
    run = tmp_path / "runs" / "tiny"
    assert (status, "Traceback" in errors) == (1, False), errors
    assert "not finite in 2 consecutive steps (learner.max_skipped)" in " ".join(errors.split())
    steps = [row for row in figures(run) if "policy/loss" in row]
    assert [row["learner/skipped_steps"] > 0 for row in steps] == [True, True]
    kept = [json.loads(line) for line in (run / "faults" / "step-2" / "episodes.jsonl").read_text().splitlines()]
    assert len(kept) == settings["ppo"]["batch_size"]


def test_nothing_is_left_running_by_a_run(finished: Path) -> None:
    assert not [child for child in psutil.Process().children(recursive=True) if "ray" in child.name()]
