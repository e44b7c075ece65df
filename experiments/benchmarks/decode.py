"""The transformers engine against `model.generate`, on the same prompts and weights: response tokens a second.

    python experiments/benchmarks/decode.py --run runs/reviews

Two workloads, in float32: 256 prompts whose responses by the run's SFT model end by EOS at their own lengths, up to 128
new tokens; and prompts of 512 tokens with 8 samples each. Both sides have as many rows in flight, and take turns.
Writes `decode.json`.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from align.config.load import load_experiment
from policies.files.adapters import load_adapter
from policies.files.base_model import load_tokenizer, stop_ids
from policies.methods.build import build_trunk
from rollouts.engine import Sampling
from rollouts.trajectory import Request
from rollouts.transformers_engine import SAMPLER_ROLE, TransformersEngine

ROWS, NEW = 64, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a run of experiments/reviews with an SFT model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--to", type=Path, default=Path(__file__).with_name("decode.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    experiment = load_experiment(arguments.run / "config.yaml")
    tokenizer = load_tokenizer(experiment.model.path)
    trunk = build_trunk(experiment.model, experiment.policy, (SAMPLER_ROLE,))
    stops = stop_ids(trunk.causal.generation_config, tokenizer)
    plain = build_trunk(experiment.model, experiment.policy, (SAMPLER_ROLE,))
    weights = load_adapter(arguments.run / "sft", experiment.policy)
    plain.write_adapter(SAMPLER_ROLE, weights)
    merged = plain.merged_weights(SAMPLER_ROLE)
    theirs_model = type(plain.causal)(plain.causal.config).eval()
    theirs_model.load_state_dict(merged, strict=False)
    theirs_model.tie_weights()
    engine = TransformersEngine(trunk, stops, ROWS)
    engine.load_adapter(0, weights)
    rows = [json.loads(line) for line in Path(experiment.data.prompts_heldout.path).read_text().splitlines()]
    reviews = [tuple(tokenizer(row["prompt"])["input_ids"]) for row in rows[:256]]
    pick = random.Random(0)
    long = [tuple(pick.randrange(2, len(tokenizer)) for _ in range(512)) for _ in range(8) for _ in range(8)]
    long = [long[i - i % 8] for i in range(64)]
    results = {
        "reviews": measure(reviews, arguments.rounds, engine, theirs_model, stops),
        "samples_of_long_prompts": measure(long, arguments.rounds, engine, theirs_model, stops),
        "rows": ROWS,
        "threads": arguments.threads,
    }
    arguments.to.write_text(json.dumps(results, indent=2) + "\n")


def measure(
    prompts: list[tuple[int, ...]],
    rounds: int,
    engine: TransformersEngine,
    model: torch.nn.Module,
    stops: frozenset[int],
) -> dict[str, object]:
    """Tokens a second of both, and their ratio round by round."""
    requests = [Request("", prompt, seed) for seed, prompt in enumerate(prompts)]

    def ours() -> int:
        return sum(t.length for t in engine.generate(requests, Sampling(1.0, NEW)))

    def theirs() -> int:
        torch.manual_seed(0)
        return sum(generate(model, prompts[start : start + ROWS], stops) for start in range(0, len(prompts), ROWS))

    speeds: dict[str, list[float]] = {"ours": [], "generate": []}
    for _ in range(rounds):
        for name, side in (("generate", theirs), ("ours", ours)):
            speeds[name].append(speed(side))
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["generate"], strict=True)]
    found = {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    print("  ".join(f"{key} {value:.2f}" for key, value in found.items()), speeds, flush=True)
    return {"ratio": found, "tokens_per_s": speeds}


@torch.inference_mode()
def generate(model: torch.nn.Module, prompts: list[tuple[int, ...]], stops: frozenset[int]) -> int:
    """Response tokens that `model.generate` makes of one batch, up to each row's first stop."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    whole = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=NEW, eos_token_id=sorted(stops),
        pad_token_id=0,
    )  # fmt: skip
    count = 0
    for row in whole[:, width:].tolist():
        count += next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
    return count


def speed(side: Callable[[], int]) -> float:
    start = time.perf_counter()
    tokens = side()
    return tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
