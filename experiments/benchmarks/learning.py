"""Does PPO here learn as much at equal KL as TRL's does? Held-out score against KL of both, drawn and written.

    python experiments/benchmarks/learning.py --model MODEL --run runs/reviews

Both start from the run's SFT model and train LoRA by the run's reward model, on the same prompts, with as many
episodes, epochs and steps of the optimizer, once for each seed. Every few updates both policies answer the same
held-out prompts from the same seeds, by the same engine, and are judged by the same reward model.
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
from bench import HERE, PEER, POLICY, TRL, refuse_missing
from matplotlib.figure import Figure
from peer import make_peer
from transformers import AutoTokenizer

from align.config.schema import SourceSettings
from align.data.readers import parse_prompt, parse_rows, read_rows
from align.runtime.seeds import seed_for
from policies.batching import collate
from policies.export import export_merged, export_reward
from policies.files.adapters import load_adapter
from policies.files.base_model import stop_ids
from policies.heads import ScalarHead
from policies.logprobs import token_logprobs
from policies.methods.build import build_trunk
from policies.schema import ModelSettings
from policies.text.tokenization import encode_prompt
from policies.trunk import AdapterWeights
from rewards.model import REWARD_ROLE, RewardModel, load_heads, read_heads
from rollouts.engine import Sampling
from rollouts.trajectory import Request, Trajectory
from rollouts.transformers_engine import SAMPLER_ROLE, TransformersEngine

SETTINGS = {"epochs": 4, "response": 48, "rate": 3e-4, "kl": 0.05, "penalty": 1.0}
"""What both sides are given; the KL coefficient is what `trl_ppo.py` has."""
TOKENS = 2048
REFERENCE = "reference"

Points = list[dict[str, float]]
"""What is found of one training: update, score and KL at each judgement."""


class Judge:
    """Score of a policy, an adapter on a base, over held-out prompts, and its KL to the reference."""

    def __init__(self, base: Path, reference: Path | None, reward: RewardModel, prompts: list[Request]) -> None:
        """reference: an adapter on the base, or None: the base as it is."""
        self.trunk = build_trunk(ModelSettings(path=str(base)), POLICY, (SAMPLER_ROLE, REFERENCE))
        if reference is not None:
            self.trunk.write_adapter(REFERENCE, load_adapter(reference, POLICY))
        tokenizer = AutoTokenizer.from_pretrained(base)
        self.engine = TransformersEngine(self.trunk, stop_ids(self.trunk.causal.generation_config, tokenizer), rows=128)
        self.reward = reward
        self.requests = [replace(p, seed=seed_for(1234, "heldout", i, 0)) for i, p in enumerate(prompts)]

    @torch.no_grad()
    def judge(self, weights: AdapterWeights) -> dict[str, float]:
        """weights: of the policy. Its mean score, and its KL in nats a sequence."""
        self.engine.load_adapter(0, weights)
        made = self.engine.generate(self.requests, Sampling(1.0, SETTINGS["response"]))
        pending, given = [t.request.prompt_ids for t in made], [t.response_ids for t in made]
        scores = self.reward.score(pending, given, TOKENS)
        kl = sum(self._logprobs(made, SAMPLER_ROLE)) - sum(self._logprobs(made, REFERENCE))
        return {"score": float(scores.mean()), "kl": kl / len(made)}

    def _logprobs(self, made: list[Trajectory], role: str) -> Iterator[float]:
        for group in self.trunk.microbatches([t.total_length for t in made], TOKENS):
            batch = collate([made[i].request.prompt_ids for i in group], [made[i].response_ids for i in group])
            states = self.trunk.hidden_packed(batch.ids, batch.lengths, role)[batch.predictors]
            yield float(
                token_logprobs(states, batch.response_ids, lambda h: self.trunk.head(h, role), 1.0).double().sum()
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--run", type=Path, required=True, help="a run of experiments/reviews with sft/ and reward/")
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--batch", type=int, default=64, help="episodes an update")
    parser.add_argument("--every", type=int, default=4, help="updates between two judgements")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--to", type=Path, default=HERE, help="folder of learning.json and learning.png")
    arguments = parser.parse_args()
    refuse_missing(parser, arguments.model, arguments.run / "sft", arguments.run / "reward")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(arguments.threads)
    model, tokenizer = ModelSettings(path=str(arguments.model)), AutoTokenizer.from_pretrained(arguments.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_merged(model, POLICY, arguments.run / "sft", tokenizer, folder / "sft")
        export_reward(model, POLICY, arguments.run / "reward", tokenizer, folder / "reward")
        rows = read_rows(SourceSettings(path=str(arguments.run / "data" / "prompts_heldout.jsonl"), limit=256))
        prompts = [
            Request(row.prompt, tuple(encode_prompt(tokenizer, row.prompt)), 0)
            for row in parse_rows(rows, parse_prompt, "error").items
        ]
        reward = read_reward(model, arguments.run / "reward")
        peer = Judge(folder / "sft", None, reward, prompts)
        own = Judge(arguments.model, arguments.run / "sft", reward, prompts)
        found: dict[str, list[Points]] = {"trl": [], "align": []}
        for seed in range(arguments.seeds):
            found["trl"].append(judged(peer, theirs(arguments, folder, seed)))
            found["align"].append(judged(own, ours(arguments, folder, seed)))
            for side, trainings in found.items():
                said = "  ".join(f"{p['update']}: {p['score']:.3f} at {p['kl']:.2f}" for p in trainings[-1])
                print(f"seed {seed} {side}: {said}", flush=True)
    (arguments.to / "learning.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, arguments.to / "learning.png")
    print("| updates | TRL | ours |\n|---|---|---|")
    for places in zip(*(zip(*trainings, strict=True) for trainings in found.values()), strict=True):
        print(f"| {places[0][0]['update']} | {' | '.join(map(cell, places))} |")


def cell(points: Sequence[dict[str, float]]) -> str:
    """One judgement of all trainings of a side: the means, and the standard error of the score's."""
    score, kl = ([point[name] for point in points] for name in ("score", "kl"))
    error = f" ± {stdev(score) / len(score) ** 0.5:.3f}" if len(score) > 1 else ""
    return f"{mean(score):.3f}{error} at {mean(kl):.2f}"


def read_reward(model: ModelSettings, folder: Path) -> RewardModel:
    """The run's reward model."""
    trunk = build_trunk(model, POLICY, (REWARD_ROLE,))
    trunk.write_adapter(REWARD_ROLE, load_adapter(folder, POLICY))
    reward = RewardModel(trunk, [ScalarHead(trunk.width)])
    load_heads(reward.heads, read_heads(folder, reward.weights), folder)
    return reward


def theirs(arguments: argparse.Namespace, folder: Path, seed: int) -> Path:
    """TRL's adapters, in folders that are named by the update."""
    given = SETTINGS | {"model": folder / "sft", "reward": folder / "reward", "batch": arguments.batch}
    given |= {"prompts": arguments.run / "data" / "prompts.jsonl", "updates": arguments.updates - 1}
    to = folder / f"trl-{seed}"
    given |= {"threads": arguments.threads, "rank": POLICY.rank, "save-every": arguments.every, "to": to, "seed": seed}
    line = [str(make_peer(PEER, TRL)), str(HERE / "trl_ppo.py"), *(f"--{n}={v}" for n, v in given.items() if n != "kl")]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    return to


def ours(arguments: argparse.Namespace, folder: Path, seed: int) -> Path:
    """The policies of our checkpoints, in folders that are named by the update."""
    experiment: dict[str, Any] = {
        "name": f"align-{seed}",
        "seed": seed,
        "runs": str(folder),
        "stages": ["ppo"],
        "model": {"path": str(arguments.model)},
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


def judged(judge: Judge, folder: Path) -> Points:
    """The judgement of the reference, and of each adapter of a folder."""
    updates = sorted(int(path.name) for path in folder.iterdir())
    start = judge.judge(judge.trunk.read_adapter(REFERENCE)) | {"update": 0}
    return [start] + [
        judge.judge(load_adapter(folder / str(update), POLICY)) | {"update": update} for update in updates
    ]


def draw(found: dict[str, list[Points]], to: Path) -> None:
    """Score against KL, a line for each training and the mean of each side's."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for colour, (side, trainings) in enumerate(found.items()):
        for points in trainings:
            axes.plot([p["kl"] for p in points], [p["score"] for p in points], color=f"C{colour}", alpha=0.3)
        means = [[mean(p[name] for p in place) for place in zip(*trainings, strict=True)] for name in ("kl", "score")]
        axes.plot(*means, marker="o", color=f"C{colour}", label=side)
    axes.set_xlabel("KL to the SFT model, nats a sequence")
    axes.set_ylabel("held-out score")
    axes.legend()
    figure.savefig(to, dpi=120)


if __name__ == "__main__":
    main()
