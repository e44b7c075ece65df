"""Time forward and backward passes over sequences of many lengths: packed, in length buckets, under a block mask.

    python experiments/benchmarks/padding.py --model MODEL --texts runs/reviews/data/demonstrations.jsonl

All variants run on the same batches in turn, with LoRA on all layers; times per batch are medians over the rounds. The
block mask is how transformers packs: one long sequence in which tokens attend only within their own part.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from bench import POLICY
from inputs import add_model, require_model, require_paths
from torch import Tensor

from policies.batching import collate
from policies.build import build_trunk
from policies.files.base_model import load_tokenizer
from policies.schema import ModelSettings
from policies.trunk import Trunk

ROLE = "policy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument("--texts", type=Path, required=True, help="JSONL with `prompt` and `completion`")
    parser.add_argument("--sequences", type=int, default=32, help="sequences per batch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    require_model(parser, arguments.model)
    require_paths(parser, arguments.texts)
    torch.set_num_threads(arguments.threads)
    tokenizer = load_tokenizer(str(arguments.model))
    lines = arguments.texts.read_text().splitlines()[: arguments.sequences * arguments.rounds]
    rows = [json.loads(line) for line in lines]
    sequences = [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in rows]
    trunk = build_trunk(ModelSettings(path=str(arguments.model), dtype=arguments.dtype), POLICY, (ROLE,))
    trunk.train_only(ROLE)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for start in range(0, len(sequences), arguments.sequences):
        for name, variant in VARIANTS.items():
            seconds[name].append(time_pass(variant, trunk, sequences[start : start + arguments.sequences]))
    tokens = sum(map(len, sequences)) / arguments.rounds
    print(f"{arguments.sequences} sequences, {tokens:.0f} tokens per batch, {arguments.dtype}")
    for name, times in seconds.items():
        timed = times[1:]  # the first one is warm-up
        print(f"{name}: {median(timed) * 1e3:.0f} ms ({min(timed) * 1e3:.0f} to {max(timed) * 1e3:.0f})")


def packed(trunk: Trunk, sequences: Sequence[list[int]]) -> list[Tensor]:
    """As in the learner."""
    return in_microbatches(trunk, sequences, padded=False)


def bucketed(trunk: Trunk, sequences: Sequence[list[int]]) -> list[Tensor]:
    """As in the learner for models that cannot run without padding."""
    return in_microbatches(trunk, sequences, padded=True)


def in_microbatches(trunk: Trunk, sequences: Sequence[list[int]], padded: bool) -> list[Tensor]:
    """Hidden states `[N, H]` of each microbatch."""
    trunk.supports_packing = not padded
    states = []
    for group in trunk.microbatches([len(sequence) for sequence in sequences]):
        batch = collate([sequences[i] for i in group], [[]] * len(group))
        states.append(trunk.hidden_packed(batch.ids, batch.lengths, ROLE))
    return states


def masked(trunk: Trunk, sequences: Sequence[list[int]]) -> list[Tensor]:
    """Hidden states `[N, H]` of all sequences; transformers derives the mask from the position ids."""
    batch = collate(sequences, [[]] * len(sequences))
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    trunk.switch(ROLE)
    return [trunk.states(input_ids=batch.ids[None], position_ids=positions[None], use_cache=False)]


Variant = Callable[[Trunk, Sequence[list[int]]], list[Tensor]]
VARIANTS: dict[str, Variant] = {"without padding": packed, "length buckets": bucketed, "block mask": masked}


def time_pass(variant: Variant, trunk: Trunk, sequences: Sequence[list[int]]) -> float:
    """Seconds of a forward and backward pass."""
    started = time.perf_counter()
    losses = [states.float().square().sum() for states in variant(trunk, sequences)]
    torch.stack(losses).sum().backward()
    trunk.zero_grad()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
