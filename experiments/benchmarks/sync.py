"""Measure the time until two rollout workers have confirmed a new adapter, and the bytes that are sent.

    python experiments/benchmarks/sync.py --model MODEL

On the given model and on a random Llama of hidden size 512 with 8 layers (about 30 M parameters), with LoRA of rank 16
on all linear layers. Writes `sync.json`.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from inputs import add_model, require_model
from memory import make_small

from align.config.schema import ClusterSettings
from align.resources.ray_cluster import ray_cluster
from policies.build import build_trunk
from policies.device import ActorOptions, ComputeSettings
from policies.schema import ModelSettings, PolicySettings
from rollouts.build import build_engine
from rollouts.ray_pool import PoolSettings, RayPool
from rollouts.schema import RolloutSettings
from rollouts.transformers_engine import SAMPLER_ROLE

POLICY = PolicySettings(rank=16, alpha=32)
WORKERS = 2
WARMUP_UPDATES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--to", type=Path, default=Path(__file__).with_name("sync.json"))
    arguments = parser.parse_args()
    require_model(parser, arguments.model)
    torch.set_num_threads(1)
    with ray_cluster(ClusterSettings(), WORKERS), tempfile.TemporaryDirectory() as folder:
        models = {"given": arguments.model, "30m": make_small(arguments.model, Path(folder))}
        results = {name: measure(model, arguments.updates) for name, model in models.items()}
    print(json.dumps(results, indent=2))
    arguments.to.write_text(json.dumps(results, indent=2) + "\n")


def measure(model: Path, updates: int) -> dict[str, float]:
    """Bytes per update, and the time until both workers have confirmed it."""
    settings = ModelSettings(path=str(model), dtype="float32")
    weights = build_trunk(settings, POLICY, (SAMPLER_ROLE,)).read_adapter(SAMPLER_ROLE)
    build = partial(build_engine, settings, POLICY, RolloutSettings())
    pool_settings = PoolSettings(chunk_size=64, timeout=600.0, straggler_factor=4.0)
    pool = RayPool(build, pool_settings, [ActorOptions(ComputeSettings(1))] * WORKERS)
    seconds = []
    for version in range(WARMUP_UPDATES + updates):
        changed = {name: tensor + 1e-3 * version for name, tensor in weights.items()}
        start = time.perf_counter()
        pool.load_adapter(version, changed)
        pool.wait()
        seconds.append(time.perf_counter() - start)
    pool.close()
    warm = sorted(seconds[WARMUP_UPDATES:])
    return {
        "adapter_bytes": sum(tensor.numel() * tensor.element_size() for tensor in weights.values()),
        "sent_bytes": pool.sent_bytes,
        "median_ms": 1000 * median(warm),
        "lowest_ms": 1000 * warm[0],
        "highest_ms": 1000 * warm[-1],
    }


if __name__ == "__main__":
    main()
