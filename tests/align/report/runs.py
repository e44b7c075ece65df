"""Made-up runs for the tests of pages: their files, with what the tests name."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.report.run_record import RunRecord, read_run_record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
"""The browser of the tests; empty where there is none."""
Row = dict[str, Any]
REFERENCE: Row = {"score_mean": 0.125, "score_std": 1.0, "length_mean": 7.0, "distinct_2": 0.5, "eos_share": 0.25}
POLICY: Row = REFERENCE | {
    "score_mean": 0.375,
    "score_gain": 0.25,
    "score_gain_low": 0.05,
    "score_gain_high": 0.45,
    "win_rate": 0.625,
    "kl_per_sequence": 3.0,
    "kl_per_token": 0.5,
    "step": 40,
}
EVALUATION: Row = {"reference": REFERENCE, "policy": POLICY, "prompts": 64}
REWARD_MODEL: Row = {"accuracy": 0.7012, "accuracy_low": 0.65, "accuracy_high": 0.75, "pairs": 1234}
SETTINGS = "name: {name}\nmodel: {{path: my-model}}\nppo: {{steps: 40, batch_size: 8, kl: {{coefficient: {beta}}}}}\n"


def step(number: int, **figures: float | None) -> Row:
    """A line of PPO's metrics; `__` in a name stands for `/`."""
    return {"stage": "ppo", "step": number} | {name.replace("__", "/"): value for name, value in figures.items()}


def sample(number: int, prompt: str, response: str = "r", **others: Any) -> Row:
    return {"stage": "ppo", "step": number, "prompt": prompt, "response": response, "score": 1.5} | others


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def record(run: Path, metrics: Sequence[Row] = (), samples: Sequence[Row] = (), **evaluation: Any) -> RunRecord:
    """A run that has logged these metrics and samples, with this evaluation."""
    write_lines(run / "metrics.jsonl", metrics)
    write_lines(run / "samples.jsonl", samples)
    return read_run_record(run, evaluation)


def write_run(run: Path, steps: int = 40, beta: float = 0.05, gain: float = 0.25) -> None:
    """Write a run that has gone through all stages."""
    rows: list[Row] = []
    for number in range(1, 21):
        rows.append({"stage": "sft", "step": number, "sft/loss": 2 / number, "sft/gradient_norm": 1.0})
        rows.append(
            {"stage": "reward", "step": number, "reward_model/loss": 0.7 / number, "reward_model/accuracy": 0.7}
        )
    for number in range(1, steps + 1):
        rows.append(ppo_step(number, steps))
    write_lines(run / "metrics.jsonl", rows)
    pairs = [
        sample(number, f"Say {n}", f"It is {n}, step {number}.", gold=0.5) for number in (1, steps) for n in (1, 2)
    ]
    write_lines(run / "samples.jsonl", pairs)
    low, high = gain - 0.2, gain + 0.2
    policy = POLICY | {"score_gain": gain, "score_gain_low": low, "score_gain_high": high, "step": steps}
    policy["score_mean"] = REFERENCE["score_mean"] + gain
    evaluation = EVALUATION | {"policy": policy, "reward_model": REWARD_MODEL, "seconds": {"sft": 10.0, "ppo": 80.0}}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    (run / "config.yaml").write_text(SETTINGS.format(name=run.name, beta=beta))
    for folder, seconds in (("sft", 10.0), ("reward", 5.0), ("policy", 80.0)):
        (run / folder).mkdir()
        facts = {"seconds": seconds, "peak_memory": {"controller": 800_000_000}}
        (run / folder / "stage.json").write_text(json.dumps(facts))


def ppo_step(number: int, steps: int) -> Row:
    share = number / steps
    return step(
        number,
        reward__mean=share + 0.1 * math.sin(number),
        kl__per_sequence=3 * share,
        policy__loss=0.1 * math.cos(number),
        policy__gradient_norm=None if number == 5 else 1.0,
        rollout__tokens=400,
        rollout__length_mean=50.0,
        time__rollout=1.0,
        time__update=2.0,
        time__step=3.0,
        time__between=0.5,
    )
