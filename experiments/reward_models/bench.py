"""Compare reward-model training here and in TRL, and on rankings and on their pairs, in prompts per second.

    python experiments/reward_models/bench.py --model MODEL --data runs/reward_models/data

Each round runs every side in a separate process, one after the other, with the same examples, model, LoRA rank and
threads. Ratios are taken within a round. All figures are written to `results.json`.
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

from align.data.examples import preference_parser
from policies.files.base_model import load_tokenizer
from policies.text.encoder import TextEncoder
from rewards.preferences import parse_preference
from rewards.schema import RewardSettings

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "benchmarks"))
from inputs import add_model, require_model, require_paths  # noqa: E402
from peer import make_peer  # noqa: E402

TRL = "1.16.0"
BATCH = 16
STEPS = 8
MAX_TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument("--data", type=Path, required=True, help="folder that make.py has written, with the rankings")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    require_model(parser, arguments.model)
    require_paths(parser, arguments.data / "harmless.jsonl", arguments.data / "solutions.jsonl")
    peer = str(make_peer(HERE / ".venv-trl", TRL))
    raw: dict[str, list[float]] = {"ours": [], "trl": [], "rankings": [], "flattened": []}
    with tempfile.TemporaryDirectory() as folder:
        files = write_rows(arguments, Path(folder))
        common = ["--model", str(arguments.model), "--threads", str(arguments.threads)]
        ours = [sys.executable, str(HERE / "ours_reward.py")]
        trl = [peer, str(HERE / "trl_reward.py")]
        sides = {
            "trl": ([*trl, "--pairs", files["pairs"]], BATCH),
            "ours": ([*ours, "--preferences", files["pairs"]], BATCH),
            "flattened": ([*ours, "--preferences", files["flattened"]], BATCH / 6),
            "rankings": ([*ours, "--preferences", files["rankings"]], BATCH),
        }
        for _ in range(arguments.rounds):
            for name, (command, prompts_per_step) in sides.items():
                process = subprocess.run([*command, *common], check=True, stdout=subprocess.PIPE, text=True)
                seconds = json.loads(process.stdout.splitlines()[-1])["seconds"]
                raw[name].append(prompts_per_step * len(seconds) / sum(seconds))
                print(f"{name:10s} {raw[name][-1]:7.2f} prompts per second", flush=True)
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
    """Write the data of all sides: human pairs with their prompts, rankings, and the pairs of the rankings."""
    encoder = TextEncoder(load_tokenizer(str(arguments.model)))
    settings = RewardSettings(max_tokens=MAX_TOKENS, ties="unknown")
    parse = preference_parser(encoder, settings, max_positions=None)
    pairs: list[dict[str, Any]] = []
    for line in (arguments.data / "harmless.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            example = parse(json.loads(line)).example
        except ValueError:  # an empty reply, or too long
            continue
        chosen, rejected = example.responses
        pairs.append({"prompt": example.prompt, "chosen": chosen, "rejected": rejected})
    lines = (arguments.data / "solutions.jsonl").read_text(encoding="utf-8").splitlines()
    rankings = [json.loads(line) for line in lines]
    flattened: list[dict[str, Any]] = []
    for row in rankings[: BATCH * STEPS // 2]:
        responses = parse_preference(row, open_ties=True).responses
        for first, second in combinations(responses, 2):
            if first != second:
                flattened.append({"prompt": row["prompt"], "chosen": first, "rejected": second})
    files = {"pairs": pairs[: BATCH * STEPS], "rankings": rankings[: BATCH * STEPS // 2], "flattened": flattened}
    paths: dict[str, str] = {}
    for name, rows in files.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths[name] = str(path)
    return paths


def ratio(speeds: list[float], baseline: list[float]) -> dict[str, float]:
    """One side's speed over the baseline's: median, minimum and maximum over the rounds."""
    ratios = [a / b for a, b in zip(speeds, baseline, strict=True)]
    return {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)}


if __name__ == "__main__":
    main()
