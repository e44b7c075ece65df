"""Training a reward model here against TRL's, and on rankings against the same ones as pairs: rows a second.

    python experiments/feedback/bench.py --model MODEL --data ../shared/data --solutions SOLUTIONS.jsonl

Each round runs every side as a process of its own, one after the other, on the same rows, model, LoRA rank and threads.
Ratios are taken within a round. All figures go to `results.json`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from align.data.datasets import preference_parser
from policies.files.base_model import load_tokenizer
from rewards.preferences import parse_preference
from rewards.schema import RewardSettings

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "benchmarks"))
from peer import make_peer  # noqa: E402

TRL = "1.16.0"
BATCH, STEPS, TOKENS = 16, 8, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="the folder with hh/harmless.jsonl")
    parser.add_argument("--solutions", type=Path, required=True, help="rankings that make.py has written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    peer = str(make_peer(HERE / ".venv-trl", TRL))
    raw: dict[str, list[float]] = {"ours": [], "trl": [], "rankings": [], "flattened": []}
    with tempfile.TemporaryDirectory() as folder:
        files = write_rows(arguments, Path(folder))
        common = ["--model", str(arguments.model), "--threads", str(arguments.threads)]
        ours, theirs = [sys.executable, str(HERE / "ours_reward.py")], [peer, str(HERE / "trl_reward.py")]
        sides = {
            "trl": ([*theirs, "--pairs", files["pairs"]], BATCH),
            "ours": ([*ours, "--feedback", files["pairs"]], BATCH),
            "flattened": ([*ours, "--feedback", files["flattened"]], BATCH / 6),
            "rankings": ([*ours, "--feedback", files["rankings"]], BATCH),
        }
        for _ in range(arguments.rounds):
            for name, (command, a_step) in sides.items():
                done = subprocess.run([*command, *common], check=True, stdout=subprocess.PIPE, text=True).stdout
                seconds = json.loads(done.splitlines()[-1])["seconds"]
                raw[name].append(a_step * len(seconds) / sum(seconds))
                print(f"{name:10s} {raw[name][-1]:7.2f} prompts a second", flush=True)
    results = {
        "pairs_ratio": ratio(raw["ours"], raw["trl"]),
        "rankings_ratio": ratio(raw["rankings"], raw["flattened"]),
        "prompts_per_s": raw,
        "trl": TRL,
        "threads": arguments.threads,
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    for name in ("pairs_ratio", "rankings_ratio"):
        print(name, "  ".join(f"{key} {value:.2f}" for key, value in results[name].items()))


def write_rows(arguments: argparse.Namespace, folder: Path) -> dict[str, str]:
    """The same rows for every side: human pairs with their prompts, rankings, and the rankings' pairs."""
    parse = preference_parser(load_tokenizer(str(arguments.model)), RewardSettings(max_tokens=TOKENS, ties="unknown"))
    pairs: list[dict[str, Any]] = []
    for line in (arguments.data / "hh" / "harmless.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            feedback = parse(json.loads(line)).feedback
        except ValueError:  # an empty reply, or too long
            continue
        chosen, rejected = feedback.responses
        pairs.append({"prompt": feedback.prompt, "chosen": chosen, "rejected": rejected})
    rankings = [json.loads(line) for line in arguments.solutions.read_text(encoding="utf-8").splitlines()]
    flattened = []
    for row in rankings[: BATCH * STEPS // 2]:
        responses = parse_preference(row, open_ties=True).responses
        flattened += [
            {"prompt": row["prompt"], "chosen": a, "rejected": b} for a, b in combinations(responses, 2) if a != b
        ]
    files = {"pairs": pairs[: BATCH * STEPS], "rankings": rankings[: BATCH * STEPS // 2], "flattened": flattened}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in files}


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)}


if __name__ == "__main__":
    main()
