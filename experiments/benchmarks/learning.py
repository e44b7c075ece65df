"""Compare learning by PPO here and in TRL: held-out score against KL.

    python experiments/benchmarks/learning.py --model MODEL --run runs/reviews

Both sides start from the run's SFT model and train LoRA against the run's reward model, with the same prompts and the
same numbers of episodes, epochs and optimizer steps, once per seed. Every few updates, one engine and one reward model
evaluate both policies on the same held-out prompts and seeds. Writes `learning.json` and `learning.png`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from bench import HERE, PEER, POLICY, TRL
from inputs import add_model, require_model, require_paths
from matplotlib.figure import Figure
from peer import make_peer
from transformers import AutoTokenizer

from align.config.schema import SourceSettings
from align.data.parsing import parse_prompt, parse_rows
from align.data.readers import read_rows
from align.runtime.seeds import seed_for
from policies.batching import collate
from policies.build import build_trunk
from policies.export import export_merged, export_reward
from policies.files.adapters import load_adapter
from policies.files.base_model import stop_ids
from policies.heads import ScalarHead
from policies.logprobs import token_logprobs
from policies.schema import ModelSettings
from policies.text.encoder import TextEncoder
from policies.trunk import AdapterWeights
from rewards.model import REWARD_ROLE, RewardModel, load_heads, read_heads
from rollouts.engine import Sampling
from rollouts.trajectory import Request, Trajectory
from rollouts.transformers_engine import SAMPLER_ROLE, TransformersEngine

SETTINGS: dict[str, Any] = {"epochs": 4, "response": 48, "rate": 3e-4, "kl": 0.05, "penalty": 1.0}
"""Settings of both sides; the KL coefficient is that of `trl_ppo.py`."""
TOKENS_PER_MICROBATCH = 2048
REFERENCE = "reference"

Points = list[dict[str, float]]
"""`update`, `score` and `kl` of each evaluation of one training."""


class Evaluator:
    """Held-out score of policies, which are adapters on a base model, and their KL to the reference."""

    def __init__(self, base: Path, reference: Path | None, reward: RewardModel, prompts: list[Request]) -> None:
        """reference: folder of an adapter on the base model, or None for the base model itself."""
        self.trunk = build_trunk(ModelSettings(path=str(base), dtype="float32"), POLICY, (SAMPLER_ROLE, REFERENCE))
        if reference is not None:
            self.trunk.write_adapter(REFERENCE, load_adapter(reference, POLICY))
        tokenizer = AutoTokenizer.from_pretrained(base)
        stops = stop_ids(self.trunk.causal.generation_config, tokenizer)
        self.engine = TransformersEngine(self.trunk, stops, max_num_seqs=128)
        self.reward = reward
        self.requests = [replace(p, seed=seed_for(1234, "heldout", i, 0)) for i, p in enumerate(prompts)]

    @torch.no_grad()
    def evaluate(self, weights: AdapterWeights) -> dict[str, float]:
        """The mean score and the KL, in nats per sequence, of the policy with these adapter weights."""
        self.engine.load_adapter(0, weights)
        trajectories = self.engine.generate(self.requests, Sampling(1.0, SETTINGS["response"]))
        prompts = [t.request.prompt_ids for t in trajectories]
        responses = [t.response_ids for t in trajectories]
        scores = self.reward.score(prompts, responses, TOKENS_PER_MICROBATCH)
        kl = sum(self._logprobs(trajectories, SAMPLER_ROLE)) - sum(self._logprobs(trajectories, REFERENCE))
        return {"score": float(scores.mean()), "kl": kl / len(trajectories)}

    def _logprobs(self, trajectories: list[Trajectory], role: str) -> Iterator[float]:
        """The summed log-probability of each microbatch's responses."""
        lengths = [t.total_length for t in trajectories]
        for group in self.trunk.microbatches(lengths, TOKENS_PER_MICROBATCH):
            prompts = [trajectories[i].request.prompt_ids for i in group]
            responses = [trajectories[i].response_ids for i in group]
            batch = collate(prompts, responses)
            states = self.trunk.hidden_packed(batch.ids, batch.lengths, role)[batch.predictors]
            logprobs = token_logprobs(states, batch.response_ids, lambda h: self.trunk.head(h, role), 1.0)
            yield float(logprobs.double().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run of experiments/reviews")
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--batch", type=int, default=64, help="episodes per update")
    parser.add_argument("--every", type=int, default=4, help="updates between evaluations")
    parser.add_argument("--seeds", type=int, default=3, help="trainings per side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--to", type=Path, default=HERE, help="folder for learning.json and learning.png")
    arguments = parser.parse_args()
    require_model(parser, arguments.model)
    require_paths(parser, arguments.run / "sft", arguments.run / "reward")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(arguments.threads)
    model = ModelSettings(path=str(arguments.model), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_merged(model, POLICY, arguments.run / "sft", tokenizer, folder / "sft")
        export_reward(model, POLICY, arguments.run / "reward", tokenizer, folder / "reward")
        rows = read_rows(SourceSettings(path=str(arguments.run / "data" / "prompts_heldout.jsonl"), limit=256))
        prompts = [row.prompt for row in parse_rows(rows, parse_prompt, "error").items]
        encoder = TextEncoder(tokenizer)
        requests = [Request(prompt, tuple(encoder.prompt(prompt)), 0) for prompt in prompts]
        reward = read_reward(model, arguments.run / "reward")
        trl_evaluator = Evaluator(folder / "sft", None, reward, requests)
        align_evaluator = Evaluator(arguments.model, arguments.run / "sft", reward, requests)
        results: dict[str, list[Points]] = {"trl": [], "align": []}
        for seed in range(arguments.seeds):
            results["trl"].append(evaluate_all(trl_evaluator, train_trl(arguments, folder, seed)))
            results["align"].append(evaluate_all(align_evaluator, train_align(arguments, folder, seed)))
            for side, trainings in results.items():
                points = "  ".join(f"{p['update']}: {p['score']:.3f} at {p['kl']:.2f}" for p in trainings[-1])
                print(f"seed {seed} {side}: {points}", flush=True)
    (arguments.to / "learning.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, arguments.to / "learning.png")
    print("| updates | TRL | ours |\n|---|---|---|")
    trl_by_update = zip(*results["trl"], strict=True)
    align_by_update = zip(*results["align"], strict=True)
    for trl_points, align_points in zip(trl_by_update, align_by_update, strict=True):
        print(f"| {trl_points[0]['update']} | {cell(trl_points)} | {cell(align_points)} |")


def cell(points: Sequence[dict[str, float]]) -> str:
    """The means over all trainings of a side at one update, with the standard error of the score."""
    score = [point["score"] for point in points]
    kl = [point["kl"] for point in points]
    error = f" ± {stdev(score) / len(score) ** 0.5:.3f}" if len(score) > 1 else ""
    return f"{mean(score):.3f}{error} at {mean(kl):.2f}"


def read_reward(model: ModelSettings, folder: Path) -> RewardModel:
    """The run's reward model."""
    trunk = build_trunk(model, POLICY, (REWARD_ROLE,))
    trunk.write_adapter(REWARD_ROLE, load_adapter(folder, POLICY))
    reward = RewardModel(trunk, [ScalarHead(trunk.width)])
    load_heads(reward.heads, read_heads(folder, reward.weights), folder)
    return reward


def train_trl(arguments: argparse.Namespace, folder: Path, seed: int) -> Path:
    """Train by TRL. Returns a folder with an adapter per evaluated update, named by its number."""
    to = folder / f"trl-{seed}"
    options: dict[str, object] = {
        "epochs": SETTINGS["epochs"],
        "response": SETTINGS["response"],
        "rate": SETTINGS["rate"],
        "penalty": SETTINGS["penalty"],
        "model": folder / "sft",
        "reward": folder / "reward",
        "batch": arguments.batch,
        "prompts": arguments.run / "data" / "prompts.jsonl",
        "updates": arguments.updates - 1,
        "threads": arguments.threads,
        "rank": POLICY.rank,
        "save-every": arguments.every,
        "to": to,
        "seed": seed,
    }
    command = [str(make_peer(PEER, TRL)), str(HERE / "trl_ppo.py")]
    command += [f"--{name}={value}" for name, value in options.items()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return to


def train_align(arguments: argparse.Namespace, folder: Path, seed: int) -> Path:
    """Train by `align`. Returns a folder with an adapter per evaluated update, named by its number."""
    experiment: dict[str, Any] = {
        "name": f"align-{seed}",
        "seed": seed,
        "runs": str(folder),
        "stages": ["ppo"],
        "model": {"path": str(arguments.model), "dtype": "float32"},
        "sft": {"adapter": str(arguments.run / "sft")},
        "policy": {"rank": POLICY.rank, "alpha": POLICY.alpha},
        "data": {"prompts": str(arguments.run / "data" / "prompts.jsonl")},
        "reward": {"model": str(arguments.run / "reward")},
        "rollouts": {"max_new_tokens": SETTINGS["response"], "max_num_seqs": arguments.batch},
        "ppo": {
            "steps": arguments.updates,
            "batch_size": arguments.batch,
            "epochs": SETTINGS["epochs"],
            "minibatches": 1,
            "truncation_penalty": SETTINGS["penalty"],
            "kl": {"coefficient": SETTINGS["kl"]},
        },
        "learner": {"policy_learning_rate": SETTINGS["rate"], "critic_learning_rate": SETTINGS["rate"]},
        "evaluation": {"prompts": 1},
        "checkpoint": {"every": arguments.every, "keep": arguments.updates},
        "cluster": {"threads": arguments.threads},
    }
    file = folder / "experiment.yaml"
    file.write_text(json.dumps(experiment))  # JSON is YAML
    subprocess.run([sys.executable, "-m", "align", "run", str(file)], check=True, stdout=subprocess.DEVNULL)
    to = folder / f"adapters-{seed}"
    to.mkdir()
    for checkpoint in (folder / f"align-{seed}" / "checkpoints" / "ppo").iterdir():
        (checkpoint / "policy").rename(to / checkpoint.name.removeprefix("step-"))
    return to


def evaluate_all(evaluator: Evaluator, folder: Path) -> Points:
    """Evaluate the reference and each adapter in a folder."""
    updates = sorted(int(path.name) for path in folder.iterdir())
    points = [evaluator.evaluate(evaluator.trunk.read_adapter(REFERENCE)) | {"update": 0}]
    for update in updates:
        weights = load_adapter(folder / str(update), POLICY)
        points.append(evaluator.evaluate(weights) | {"update": update})
    return points


def draw(results: dict[str, list[Points]], to: Path) -> None:
    """Plot score against KL, with a line per training and one through the means of each side."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for colour, (side, trainings) in enumerate(results.items()):
        for points in trainings:
            kl = [point["kl"] for point in points]
            score = [point["score"] for point in points]
            axes.plot(kl, score, color=f"C{colour}", alpha=0.3)
        mean_kl: list[float] = []
        mean_score: list[float] = []
        for same_update in zip(*trainings, strict=True):
            mean_kl.append(mean(point["kl"] for point in same_update))
            mean_score.append(mean(point["score"] for point in same_update))
        axes.plot(mean_kl, mean_score, marker="o", color=f"C{colour}", label=side)
    axes.set_xlabel("KL to the SFT model, nats per sequence")
    axes.set_ylabel("held-out score")
    axes.legend()
    figure.savefig(to, dpi=120)


if __name__ == "__main__":
    main()
