"""Change PPO's settings one at a time, and measure how close each policy comes to the best one at its KL.

    python experiments/quickstart/ablation.py --run runs/quickstart --to runs/ablation

Starts from the SFT model and the reward model of a finished quickstart run. All variants change one thing of `BASE`,
which settles near 1 nat. Prints a table and writes `ablation.json`; runs that are there already are not repeated.
Efficiency is the policy's gain over the reference as a share of that of the best policy at the same KL, estimated from
samples of the reference (docs/evaluation.md), with its 95 % interval.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rerun import require_run, rerun_ppo

from align.outputs.trained_run import TrainedRun, open_run
from align.stages.distance import DistanceStudy
from align.stages.pipeline import load_datasets
from align.stages.policy_evaluation import LoadedReward
from policies.files.adapters import load_adapter

BASE: dict[str, object] = {
    "ppo.steps": 20,
    "ppo.kl.coefficient": 0.5,
    "ppo.gae_lambda": 1,
    "learner.schedule": "cosine",
}
"""2,560 episodes with a penalty whose optimum is about 1 nat away, and a learning rate that ends at zero."""
VARIANTS: dict[str, dict[str, object]] = {
    "base": {},
    "as shipped": {
        "ppo.steps": 10,
        "ppo.kl.coefficient": 0.05,
        "ppo.gae_lambda": 0.95,
        "learner.schedule": "constant",
    },
    "schedule constant": {"learner.schedule": "constant"},
    "schedule linear": {"learner.schedule": "linear"},
    "λ 0.95": {"ppo.gae_lambda": 0.95},
    "λ 0.9": {"ppo.gae_lambda": 0.9},
    "half the steps": {"ppo.steps": 10},
    "twice the steps": {"ppo.steps": 40},
    "batch 64, twice the steps": {"ppo.batch_size": 64, "ppo.steps": 40},
    "batch 256, half the steps": {"ppo.batch_size": 256, "ppo.steps": 10},
    "1 epoch": {"ppo.epochs": 1},
    "4 epochs": {"ppo.epochs": 4},
    "1 minibatch": {"ppo.minibatches": 1},
    "8 minibatches": {"ppo.minibatches": 8},
    "policy rate × ½": {"learner.policy_learning_rate": 5e-4},
    "policy rate × 2": {"learner.policy_learning_rate": 2e-3},
    "critic rate × ⅓": {"learner.critic_learning_rate": 3e-4},
    "critic rate × 3": {"learner.critic_learning_rate": 3e-3},
    "critic warm-up of 2 steps": {"ppo.critic.warmup": 2},
    "critic as a head on the policy": {"ppo.critic.kind": "head"},
    "advantages not whitened": {"ppo.whiten_advantages": "false"},
    "rewards whitened": {"ppo.whiten_rewards": "true"},
    "KL in the loss, k3": {"ppo.kl.where": "loss", "ppo.kl.estimator": "k3"},
    "clip 0.1": {"ppo.clip_low": 0.1, "ppo.clip_high": 0.1},
    "clip 0.4": {"ppo.clip_low": 0.4, "ppo.clip_high": 0.4},
    "RLOO, 4 samples": {"ppo.estimator": "rloo", "ppo.samples_per_prompt": 4},
    "GRPO, 4 samples": {"ppo.estimator": "grpo", "ppo.samples_per_prompt": 4},
    "REINFORCE++": {"ppo.estimator": "reinforce++"},
    "SGD": {"learner.optimizer": "sgd", "learner.policy_learning_rate": 0.5, "learner.critic_learning_rate": 0.5},
    "Adam's ε 1e-8": {"learner.adam_epsilon": 1e-8},
}
"""What differs from `BASE`, as overrides."""


def main() -> None:
    """Do the runs that are missing, measure them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished quickstart run")
    parser.add_argument("--to", type=Path, required=True, help="folder of the new runs")
    parser.add_argument("--only", default="", help="run only variants whose name contains this")
    parser.add_argument("--samples", type=int, default=256, help="reference samples per prompt, an even number")
    arguments = parser.parse_args()
    require_run(arguments.run)
    study = make_study(open_run(arguments.run), arguments.samples)
    print("| | KL, nats | gain of score | gain of gold score | efficiency | of gold score |")
    print("|---|---|---|---|---|---|")
    results: dict[str, dict[str, Any]] = {}
    for number, (name, changes) in enumerate(VARIANTS.items()):
        if arguments.only not in name:
            continue
        folder = f"variant-{number}"
        rerun_ppo(arguments.run, arguments.to, folder, BASE | {"evaluation.best_of": 0} | changes)
        policy = load_adapter(arguments.to / folder / "policy", study.reward.experiment.policy)
        results[name] = study.compare(number, policy)
        print(row(name, results[name]), flush=True)
    (arguments.to / "ablation.json").write_text(json.dumps(results, indent=2) + "\n")


def make_study(run: TrainedRun, samples: int) -> DistanceStudy:
    """The frontier of the run's reward, for all variants."""
    reward = LoadedReward(run.experiment, run.folder)
    reward.restore(run.folder)
    prompts = load_datasets(run.experiment).prompts_heldout
    trained = load_adapter(run.folder.policy, run.experiment.policy)
    return DistanceStudy(reward, prompts, samples, trained)


def row(name: str, figures: dict[str, Any]) -> str:
    """A row of the table, with half the width of each interval."""
    cells = [cell(figures, key, form) for key, form in (("kl", "{:.2f}"), ("score_gain", "{:.3f}"))]
    cells.append(cell(figures, "gold_gain", "{:.3f}"))
    cells += [cell(figures, key, "{:.3f}") for key in ("score_efficiency", "gold_efficiency")]
    return f"| {name} | {' | '.join(cells)} |"


def cell(figures: dict[str, Any], key: str, form: str) -> str:
    if key not in figures:
        return ""
    half_width = (figures[f"{key}_high"] - figures[f"{key}_low"]) / 2
    return f"{form.format(figures[key])} ± {form.format(half_width)}"


if __name__ == "__main__":
    main()
