"""The experiments on real feedback, a few steps of each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from align.config.load import load_experiment
from align.evaluation.reward_model import DIAGNOSTICS
from tests.integration.tiny_run import run_in_process

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not here")
@pytest.mark.parametrize("name", ["hh", "gsm8k", "ratings", "pairs", "mixed"])
def test_each_kind_of_real_feedback_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made = tmp_path / "made"
    sentences = str(DATA / "reviews" / "sentences.jsonl")
    for script, arguments in (
        ("feedback/make.py", ["--data", str(DATA)]),
        ("reviews/make.py", ["--sentences", sentences]),
    ):
        line = [sys.executable, f"experiments/{script}", *arguments, "--to", str(made)]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    settings = load_experiment(f"experiments/feedback/{name}.yaml").model_dump(mode="json")
    text = json.dumps(settings).replace("runs/feedback/data", str(made)).replace("runs/reviews/data", str(made))
    settings = json.loads(text) | {"runs": str(tmp_path), "tracking": {"wandb": "disabled"}}
    for source in ("preferences", "preferences_heldout"):
        if settings["data"][source]:
            settings["data"][source]["limit"] = 60
    settings["reward"] |= {"epochs": 1, "evaluate_every": 0, "patience": None}
    run = run_in_process(settings)
    found = json.loads((run / "reward" / DIAGNOSTICS).read_text())
    assert 0 <= found["accuracy"] <= 1
    assert max(found["invariance"].values()) <= 1e-5
