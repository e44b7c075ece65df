"""Train the quickstart's policy with every adaptation method and compare the results.

    python experiments/quickstart/methods.py --run runs/quickstart --to runs/methods

Uses the data of a finished quickstart run. Each method gets its own run of SFT, a reward model on some of the pairs,
and PPO. Prints a table: trained parameters, peak memory, time per PPO step, SFT's held-out loss, and gold win rate.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from rerun import require_run

from align.config.load import load_experiment
from align.resources.memory import measure

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8, "alpha": 16},
    "lora, rsLoRA": {"rank": 8, "alpha": 16, "rslora": True},
    "lora, DoRA": {"rank": 8, "alpha": 16, "dora": True},
    "lora, PiSSA": {"rank": 8, "alpha": 16, "init": "pissa"},
    "lora, LoRA-plus": {"rank": 8, "alpha": 16, "lora_plus": 4},
    "qlora": {"method": "qlora", "rank": 8, "alpha": 16},
    "adalora": {"method": "adalora", "rank": 8, "alpha": 24},
    "loha": {"method": "loha", "rank": 8, "alpha": 16},
    "lokr": {"method": "lokr", "rank": 8, "alpha": 16},
    "oft": {"method": "oft", "block_size": 16},
    "vera": {"method": "vera", "rank": 64},
    "ia3": {"method": "ia3"},
    "bottleneck": {"method": "bottleneck", "bottleneck": 16},
    "adamix": {"method": "adamix", "bottleneck": 16},
    "compacter": {"method": "compacter", "bottleneck": 16},
    "bitfit": {"method": "bitfit"},
    "layer_norm": {"method": "layer_norm"},
    "top_layers": {"method": "top_layers", "layers": 2},
    "feature": {"method": "feature"},
    "prompt_tuning": {"method": "prompt_tuning"},
    "intrinsic_prompt": {"method": "intrinsic_prompt"},
    "p_tuning": {"method": "p_tuning"},
    "prefix_tuning": {"method": "prefix_tuning"},
    "full": {"method": "full"},
}
RATES = {
    "bitfit": 5e-2,
    "top_layers": 1e-3,
    "full": 5e-4,
    **dict.fromkeys(("lora", "qlora", "adalora", "loha", "oft", "bottleneck", "adamix", "compacter"), 2e-3),
}
"""Learning rates of SFT and the reward model by method; others use HIGH_RATE."""
HIGH_RATE = 1e-2
"""Methods that train few parameters need a higher rate."""
SOFT_PROMPT = {
    "sft": {"learning_rate": 3e-2},
    "reward": {"learning_rate": 4e-2, "epochs": 3},
    "learner": {"policy_learning_rate": 8e-3, "critic_learning_rate": 3e-2},
}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "prompt_tuning": SOFT_PROMPT,
    "intrinsic_prompt": SOFT_PROMPT,
    "p_tuning": {
        "sft": {"learning_rate": 1e-2},
        "reward": {"learning_rate": 1e-1, "epochs": 3},
        "learner": {"policy_learning_rate": 5e-2, "critic_learning_rate": 3e-2},
        "ppo": {"steps": 60},
    },
    "prefix_tuning": SOFT_PROMPT | {"learner": {"policy_learning_rate": 5e-2, "critic_learning_rate": 5e-2}},
}
"""Changed settings of soft prompts, which learn slowly; they also get twice the pairs and more PPO steps."""


def main() -> None:
    """Do the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished quickstart run")
    parser.add_argument("--to", type=Path, required=True, help="folder of the new runs")
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--only", default="", help="run only methods whose name contains this")
    arguments = parser.parse_args()
    require_run(arguments.run)
    titles = ("method", "trained, of the base", "peak memory", "PPO step", "SFT loss, held out", "gold win rate")
    print(f"| {' | '.join(titles)} |")
    print("|---" * len(titles) + "|", flush=True)
    for name, policy in METHODS.items():
        if arguments.only in name:
            print(row(name, train(arguments, name, policy)), flush=True)


def train(arguments: argparse.Namespace, name: str, policy: dict[str, Any]) -> Path:
    """Run all stages with a method unless that run is already finished. Returns its folder."""
    folder = arguments.to / name.replace(", ", "-")
    if (folder / "evaluation.json").is_file():
        return folder
    experiment = load_experiment(arguments.run / "config.yaml").model_dump(mode="json")
    method = policy.get("method", "lora")
    rate = RATES.get(method, HIGH_RATE)
    experiment |= {"name": folder.name, "runs": str(arguments.to), "policy": policy}
    experiment["sft"]["learning_rate"] = rate
    experiment["reward"]["learning_rate"] = rate
    experiment["learner"] |= {"policy_learning_rate": rate / 2, "critic_learning_rate": rate / 2}
    experiment["data"]["preferences"]["limit"] = arguments.pairs
    if changes := CHANGES.get(method):
        experiment["data"]["preferences"]["limit"] = 2 * arguments.pairs
        experiment["ppo"] |= {"steps": 25}
        experiment["ppo"]["critic"] |= {"warmup": 2}
        for section, settings in changes.items():
            experiment[section] |= settings
    experiment["evaluation"]["best_of"] = 0
    file = arguments.to / f"{folder.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(experiment))  # JSON is YAML
    run = subprocess.Popen([sys.executable, "-m", "align", "run", str(file), "--replace"], stdout=sys.stderr)
    _, status, usage = os.wait4(run.pid, 0)
    if status:
        raise SystemExit(f"{name}: align run ended with {os.waitstatus_to_exitcode(status)}")
    (folder / "memory.json").write_text(json.dumps({"peak_mb": usage.ru_maxrss / 1024}))
    return folder


def row(name: str, folder: Path) -> str:
    """One row of the table, in Markdown."""
    experiment = load_experiment(folder / "config.yaml")
    sizes = measure(experiment.model, experiment.policy)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    step = median(line["time/step"] for line in metrics if "time/step" in line)
    loss = next(line["sft/heldout_loss"] for line in metrics if "sft/heldout_loss" in line)
    peak = json.loads((folder / "memory.json").read_text())["peak_mb"]
    policy = evaluation["policy"]
    gain = f"{evaluation['reference']['gold_mean']:.2f} → {policy['gold_mean']:.2f}"
    cells = [
        name,
        f"{sizes.adapter:,}, {sizes.adapter / sizes.base:.2%}",
        f"{peak:.0f} MB",
        f"{step:.2f} s",
        f"{loss:.3f}",
        f"{policy['gold_win_rate']:.1%}, {gain}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
