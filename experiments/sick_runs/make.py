"""Make runs that are sick on purpose, and healthy ones, in the quickstart's world, and record their metrics.

    python experiments/sick_runs/make.py --to runs/sick --seeds 0 1 2

For each seed: the environment, SFT, a reward model for each kind of annotators, and PPO with one thing wrong. What the
rules of `align.diagnosis` read of each run goes to `recorded.jsonl.gz` beside this file.
"""

import argparse
import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.runs.record_files import METRICS, read_lines

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart"
RECORDED = HERE / "recorded.jsonl.gz"
PAIRS = 4000
"""Preferences that a reward model is trained on, a quarter of the quickstart's."""
DIGITS = 5
"""Significant digits of a recorded figure."""


@dataclass(frozen=True)
class Case:
    """A run of PPO.

    Attributes:
        cause: The verdict that should come first or second; None: the run is healthy.
        settings: What differs from the quickstart, by dotted key.
        annotators: Whose preferences the reward model is trained on.
        command: The module that runs instead of `align`.
    """

    cause: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    annotators: str = "usual"
    command: tuple[str, ...] = ("-m", "align")


GROUP = {"ppo.samples_per_prompt": 4, "learner.policy_learning_rate": 1e-3}
CASES = {
    "hacking": Case(
        "reward hacking",
        {
            "ppo.kl.coefficient": 0.005,
            "ppo.steps": 16,
            "evaluation.gold": f"{QUICKSTART / 'synthetic.py'}:strict_gold_scores",
        },
        annotators="excitable",
    ),
    "length": Case("reward model learned length", {"ppo.kl.coefficient": 0.02}, annotators="length"),
    "stale sampler": Case("sampler mismatch", {"ppo.max_mismatch": 1000.0}, command=(str(HERE / "stale_sampler.py"),)),
    "entropy": Case(
        "entropy collapse",
        {
            "ppo.kl.coefficient": 0.0,
            "ppo.epochs": 4,
            "ppo.steps": 16,
            "reward.model": None,
            "reward.terms": {
                "likeness": {"kind": "function", "function": f"{HERE / 'one_reply.py'}:likeness", "weight": 4.0}
            },
        },
    ),
    "strong KL": Case("KL too strong", {"ppo.kl.coefficient": 5.0}),
    "dead critic": Case("critic does not learn", {"learner.critic_learning_rate": 1e-9}),
    "truncated": Case("truncated responses", {"rollouts.max_new_tokens": 16}),
    "quickstart": Case(),
    "weak KL": Case(settings={"ppo.kl.coefficient": 0.02}),
    "long": Case(settings={"ppo.steps": 20}),
    "KL in the loss": Case(settings={"ppo.kl.where": "loss"}),
    "GRPO": Case(settings={**GROUP, "ppo.estimator": "grpo"}),
    "RLOO": Case(settings={**GROUP, "ppo.estimator": "rloo"}),
    "two terms": Case(
        settings={
            "reward.terms": {
                "model": {"kind": "model"},
                "polite": {"kind": "function", "function": f"{HERE / 'polite.py'}:polite", "weight": 0.2},
            }
        }
    ),
}
"""Seven sick runs and seven healthy ones."""


def main() -> None:
    """Do the runs that are missing, and record all that are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", nargs="+", choices=CASES, default=list(CASES), help="which runs to do; default: all")
    parser.add_argument("--record", type=Path, default=RECORDED, help="file of the recorded metrics")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for name in arguments.runs:
            train(arguments.to.absolute() / f"seed-{seed}", seed, name, CASES[name])
    record(arguments.to, arguments.record)


def train(folder: Path, seed: int, name: str, case: Case) -> None:
    """Run PPO, and whatever has to come before it and is not there yet."""
    environment = make_environment(folder, seed, "usual")
    stages(folder, environment, "sft", {"stages": ["sft"], "seed": seed})
    stages(
        folder,
        make_environment(folder, seed, case.annotators),
        f"reward-{case.annotators}",
        {"stages": ["reward"], "seed": seed, "sft.adapter": folder / "sft" / "sft"},
    )
    upstream = {"sft.adapter": folder / "sft" / "sft", "reward.model": folder / f"reward-{case.annotators}" / "reward"}
    settings = {"stages": ["ppo"], "seed": seed, "evaluation.every": 2, **upstream, **case.settings}
    stages(folder, environment, name.replace(" ", "-"), settings, case.command)


def make_environment(folder: Path, seed: int, annotators: str) -> Path:
    """The environment of these annotators."""
    environment = folder / f"environment-{annotators}"
    make = [sys.executable, str(QUICKSTART / "make.py"), "--to", str(environment)]
    subprocess.run([*make, "--seed", str(seed), "--annotators", annotators], check=True)
    return environment


def stages(
    folder: Path, environment: Path, name: str, settings: dict[str, Any], command: tuple[str, ...] = ("-m", "align")
) -> None:
    """Run stages with the quickstart's settings but for some, unless that run is there."""
    if (folder / name / "evaluation.json").is_file():
        return
    changed = {
        "name": name,
        "runs": folder,
        "model.path": environment / "base",
        "data.demonstrations": environment / "demonstrations.jsonl",
        "data.preferences": {"path": environment / "pairs.jsonl", "limit": PAIRS},
        "data.preferences_heldout": environment / "pairs_heldout.jsonl",
        "data.prompts": environment / "prompts.jsonl",
        "data.prompts_heldout": environment / "prompts_heldout.jsonl",
        "evaluation.gold": f"{QUICKSTART / 'synthetic.py'}:gold_scores",
        "evaluation.prompts": 128,
        "evaluation.best_of": 0,
        "tracking.wandb": "disabled",
        **settings,
    }
    overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in changed.items()]
    experiment = str(QUICKSTART / "experiment.yaml")
    subprocess.run([sys.executable, *command, "run", experiment, "--replace", *overrides], check=True)


def record(runs: Path, to: Path) -> None:
    """Write what the rules read of each finished run."""
    lines = [json.dumps(run) + "\n" for run in recorded(runs)]
    with gzip.GzipFile(to, "wb", mtime=0) as file:
        file.write("".join(lines).encode())


def read_recorded(path: Path) -> list[dict[str, Any]]:
    """The runs in a file that `record` has written."""
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    return [json.loads(line) for line in lines]


def recorded(runs: Path) -> Iterator[dict[str, Any]]:
    """The finished runs, seed by seed."""
    for folder in sorted(runs.glob("seed-*")):
        for name, case in CASES.items():
            run = folder / name.replace(" ", "-")
            if not (run / "evaluation.json").is_file():
                continue
            diagnostics = run / "reward" / "diagnostics.json"
            yield {
                "name": name,
                "seed": int(folder.name.removeprefix("seed-")),
                "cause": case.cause,
                "metrics": rounded(read_lines(run / METRICS)),
                "diagnostics": rounded(json.loads(diagnostics.read_text())) if diagnostics.is_file() else {},
            }


def rounded(value: Any) -> Any:
    """The value with its numbers rounded."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
