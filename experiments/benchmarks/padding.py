"""Forward and backward passes over rows of many lengths: without padding, in length buckets, under a block mask.

    python experiments/benchmarks/padding.py --model MODEL --texts runs/reviews/data/demonstrations.jsonl

Each way is given the same batches, in turn, with LoRA on all layers; seconds a batch are medians over the rounds. The
block mask is transformers' own: all rows are one, in which no token sees another row's.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from bench import POLICY
from torch import Tensor

from policies.batching import collate
from policies.files.base_model import load_tokenizer
from policies.methods.build import build_trunk
from policies.schema import ModelSettings
from policies.trunk import Trunk

ROLE = "policy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--texts", type=Path, required=True, help="JSONL with `prompt` and `completion`")
    parser.add_argument("--rows", type=int, default=32, help="of a batch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = load_tokenizer(str(arguments.model))
    lines = [json.loads(line) for line in arguments.texts.read_text().splitlines()[: arguments.rows * arguments.rounds]]
    texts = [tokenizer(line["prompt"] + line["completion"])["input_ids"] for line in lines]
    trunk = build_trunk(ModelSettings(path=str(arguments.model), dtype=arguments.dtype), POLICY, (ROLE,))
    trunk.train_only(ROLE)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for start in range(0, len(texts), arguments.rows):
        for name, way in WAYS.items():
            seconds[name].append(timed(way, trunk, texts[start : start + arguments.rows]))
    print(f"{arguments.rows} rows, {sum(map(len, texts)) / arguments.rounds:.0f} tokens a batch, {arguments.dtype}")
    for name, spent in seconds.items():
        rest = spent[1:]
        print(f"{name}: {median(rest) * 1e3:.0f} ms ({min(rest) * 1e3:.0f} to {max(rest) * 1e3:.0f})")


def packed(trunk: Trunk, rows: Sequence[list[int]]) -> list[Tensor]:
    """As the learner does it."""
    return in_passes(trunk, rows, padded=False)


def bucketed(trunk: Trunk, rows: Sequence[list[int]]) -> list[Tensor]:
    """As the learner does it where a model cannot do without padding."""
    return in_passes(trunk, rows, padded=True)


def in_passes(trunk: Trunk, rows: Sequence[list[int]], padded: bool) -> list[Tensor]:
    trunk.supports_packing = not padded
    made = []
    for group in trunk.microbatches([len(row) for row in rows]):
        batch = collate([rows[i] for i in group], [[]] * len(group))
        made.append(trunk.hidden_packed(batch.ids, batch.lengths, ROLE))
    return made


def masked(trunk: Trunk, rows: Sequence[list[int]]) -> list[Tensor]:
    """transformers sees from the positions where a row begins, and makes the mask."""
    batch = collate(rows, [[]] * len(rows))
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    trunk.switch(ROLE)
    return [trunk.states(input_ids=batch.ids[None], position_ids=positions[None], use_cache=False)]


WAYS = {"without padding": packed, "length buckets": bucketed, "block mask": masked}


def timed(way: Callable[[Trunk, Sequence[list[int]]], list[Tensor]], trunk: Trunk, rows: Sequence[list[int]]) -> float:
    """Seconds of a forward and backward pass."""
    started = time.perf_counter()
    torch.stack([states.float().square().sum() for states in way(trunk, rows)]).sum().backward()
    trunk.zero_grad()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
