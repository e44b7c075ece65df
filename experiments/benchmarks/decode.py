"""Compare the transformers engine with `model.generate` in response tokens per second.

    python experiments/benchmarks/decode.py --run runs/reviews

Two workloads in float32: 256 prompts whose responses by the run's SFT model end by EOS at different lengths, up to 128
new tokens; and prompts of 512 tokens with 8 samples each. Both sides have the same weights and the same number of
sequences in flight, and take turns. Writes `decode.json`.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from inputs import require_paths
from transformers import PreTrainedModel

from align.config.load import load_experiment
from align.config.schema import Experiment
from align.data.readers import read_rows
from policies.build import build_trunk
from policies.files.adapters import load_adapter
from policies.files.base_model import load_tokenizer, stop_ids
from policies.trunk import AdapterWeights
from rollouts.engine import Sampling
from rollouts.trajectory import Request
from rollouts.transformers_engine import SAMPLER_ROLE, TransformersEngine

MAX_NUM_SEQS = 64
MAX_NEW_TOKENS = 128
SAMPLES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a run of experiments/reviews with an SFT model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--to", type=Path, default=Path(__file__).with_name("decode.json"))
    arguments = parser.parse_args()
    require_paths(parser, arguments.run / "sft")
    torch.set_num_threads(arguments.threads)
    experiment = load_experiment(arguments.run / "config.yaml")
    tokenizer = load_tokenizer(experiment.model.path)
    trunk = build_trunk(experiment.model, experiment.policy, (SAMPLER_ROLE,))
    stops = stop_ids(trunk.causal.generation_config, tokenizer)
    weights = load_adapter(arguments.run / "sft", experiment.policy)
    merged = merged_model(experiment, weights)
    engine = TransformersEngine(trunk, stops, max_num_seqs=MAX_NUM_SEQS)
    engine.load_adapter(0, weights)
    source = experiment.data.prompts_heldout
    if source is None:
        parser.error(f"{arguments.run} has no data.prompts_heldout: give a run of experiments/reviews")
    prompts = [row.values["prompt"] for row in read_rows(source)]
    reviews = [tuple(tokenizer(prompt)["input_ids"]) for prompt in prompts[:256]]
    results = {
        "reviews": measure(reviews, arguments.rounds, engine, merged, stops),
        "samples_of_long_prompts": measure(long_prompts(len(tokenizer)), arguments.rounds, engine, merged, stops),
        "rows": MAX_NUM_SEQS,
        "threads": arguments.threads,
    }
    arguments.to.write_text(json.dumps(results, indent=2) + "\n")


def merged_model(experiment: Experiment, weights: AdapterWeights) -> PreTrainedModel:
    """A transformers model with the adapter merged into its weights."""
    trunk = build_trunk(experiment.model, experiment.policy, (SAMPLER_ROLE,))
    trunk.write_adapter(SAMPLER_ROLE, weights)
    model = type(trunk.causal)(trunk.causal.config).eval()
    model.load_state_dict(trunk.merged_weights(SAMPLER_ROLE), strict=False)
    model.tie_weights()
    return model


def long_prompts(vocabulary: int) -> list[tuple[int, ...]]:
    """Random prompts of 512 tokens, each SAMPLES times in a row."""
    rng = random.Random(0)
    prompts: list[tuple[int, ...]] = []
    for _ in range(MAX_NUM_SEQS):
        prompts.append(tuple(rng.randrange(2, vocabulary) for _ in range(512)))
    return [prompts[i - i % SAMPLES] for i in range(MAX_NUM_SEQS)]


def measure(
    prompts: list[tuple[int, ...]],
    rounds: int,
    engine: TransformersEngine,
    model: torch.nn.Module,
    stops: frozenset[int],
) -> dict[str, object]:
    """Tokens per second of both sides, and their ratio within each round."""
    requests = [Request("", prompt, seed) for seed, prompt in enumerate(prompts)]

    def by_engine() -> int:
        return sum(t.length for t in engine.generate(requests, Sampling(1.0, MAX_NEW_TOKENS)))

    def by_generate() -> int:
        torch.manual_seed(0)
        starts = range(0, len(prompts), MAX_NUM_SEQS)
        return sum(generate(model, prompts[start : start + MAX_NUM_SEQS], stops) for start in starts)

    speeds: dict[str, list[float]] = {"ours": [], "generate": []}
    for _ in range(rounds):
        for name, side in (("generate", by_generate), ("ours", by_engine)):
            speeds[name].append(speed(side))
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["generate"], strict=True)]
    ratio = {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    print("  ".join(f"{key} {value:.2f}" for key, value in ratio.items()), speeds, flush=True)
    return {"ratio": ratio, "tokens_per_s": speeds}


@torch.inference_mode()
def generate(model: torch.nn.Module, prompts: list[tuple[int, ...]], stops: frozenset[int]) -> int:
    """Number of response tokens that `model.generate` returns for a batch, up to the first stop token of each."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    sequences = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=sorted(stops),
        pad_token_id=0,
    )
    count = 0
    for response in sequences[:, width:].tolist():
        count += next((i + 1 for i, token in enumerate(response) if token in stops), len(response))
    return count


def speed(side: Callable[[], int]) -> float:
    """Response tokens per second."""
    start = time.perf_counter()
    tokens = side()
    return tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
