"""The experiments on real feedback, a few steps of each."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from align.config.load import load_experiment
from align.evaluation.reward_model import DIAGNOSTICS
from rewards.preferences import Ranking, parse_preference
from tests.integration.tiny_run import run_in_process
from tests.outside_data import outside_data, outside_model

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hh", "gsm8k", "ratings", "pairs", "mixed"])
def test_each_kind_of_real_feedback_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = outside_data()
    monkeypatch.setenv("ALIGN_MODEL", str(outside_model()))
    monkeypatch.chdir(ROOT)
    made = tmp_path / "made"
    sentences = str(data / "reviews" / "sentences.jsonl")
    for script, arguments in (
        ("reward_models/make.py", ["--data", str(data)]),
        ("reviews/make.py", ["--sentences", sentences]),
    ):
        line = [sys.executable, f"experiments/{script}", *arguments, "--to", str(made)]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    settings = load_experiment(f"experiments/reward_models/{name}.yaml").model_dump(mode="json")
    text = json.dumps(settings).replace("runs/reward_models/data", str(made)).replace("runs/reviews/data", str(made))
    settings = json.loads(text) | {"runs": str(tmp_path), "tracking": {"wandb": "disabled"}}
    for source in ("preferences", "preferences_heldout"):
        if settings["data"][source]:
            settings["data"][source]["limit"] = 60
    settings["reward"] |= {"epochs": 1, "evaluate_every": 0, "patience": None}
    run = run_in_process(settings)
    found = json.loads((run / "reward" / DIAGNOSTICS).read_text())
    assert 0 <= found["accuracy"] <= 1
    assert max(found["invariance"].values()) <= 1e-5


def test_rankings_from_the_hub_put_the_solution_of_the_problem_first() -> None:
    script = runpy.run_path(str(ROOT / "experiments" / "reward_models" / "make.py"))
    problems = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(6)]
    examples = [parse_preference(row, open_ties=True) for row in script["rankings_of_one_solution"](problems)]
    assert [example.prompt for example in examples] == [f"q{i}\n" for i in range(6)]
    assert [example.responses[0] for example in examples] == [f"a{i}" for i in range(6)]
    assert all(len(set(example.responses)) == 4 for example in examples)
    assert {example.preference for example in examples} == {Ranking((1, 3), open=True)}
