"""How long an adapter takes from the learner to two rollout workers that have confirmed it, and how many bytes go out.

    python experiments/benchmarks/sync.py --model MODEL

On the given model and on a random Llama 512 wide with 8 layers (about 30 M), LoRA of rank 16 on all linear layers.
Writes `sync.json`.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from memory import make_small

from align.config.schema import ClusterSettings
from align.resources.ray_cluster import ray_cluster
from policies.device import ComputeSettings
from policies.methods.build import build_trunk
from policies.schema import ModelSettings, PolicySettings
from rollouts.build import build_engine
from rollouts.ray_pool import RayPool
from rollouts.schema import RolloutSettings
from rollouts.transformers_engine import SAMPLER_ROLE

POLICY = PolicySettings(rank=16, alpha=32)
WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--to", type=Path, default=Path(__file__).with_name("sync.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with ray_cluster(ClusterSettings(), WORKERS), tempfile.TemporaryDirectory() as folder:
        models = {"given": arguments.model, "30m": make_small(arguments.model, Path(folder))}
        results = {name: measure(model, arguments.updates) for name, model in models.items()}
    print(json.dumps(results, indent=2))
    arguments.to.write_text(json.dumps(results, indent=2) + "\n")


def measure(model: Path, updates: int) -> dict[str, float]:
    """Seconds from having the weights until both workers have confirmed them."""
    settings = ModelSettings(path=str(model))
    weights = build_trunk(settings, POLICY, (SAMPLER_ROLE,)).read_adapter(SAMPLER_ROLE)
    build = partial(build_engine, settings, POLICY, RolloutSettings())
    pool = RayPool(build, WORKERS, 64, 600.0, 4.0, ComputeSettings(1), 0.0)
    seconds = []
    for version in range(updates + 3):
        changed = {name: tensor + 1e-3 * version for name, tensor in weights.items()}
        start = time.perf_counter()
        pool.load_adapter(version, changed)
        pool.wait()
        seconds.append(time.perf_counter() - start)
    pool.close()
    warm = sorted(seconds[3:])
    return {
        "adapter_bytes": sum(tensor.numel() * tensor.element_size() for tensor in weights.values()),
        "sent_bytes": pool.sent,
        "median_ms": 1000 * median(warm),
        "lowest_ms": 1000 * warm[0],
        "highest_ms": 1000 * warm[-1],
    }


if __name__ == "__main__":
    main()
