"""Scoring by two adapters: one pass each, or one pass over a batch of both, as PEFT's `adapter_names` allows.

python experiments/benchmarks/mixed.py --model MODEL
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from bench import POLICY
from peft import get_peft_model
from torch import Tensor

from policies.files.adapters import lora_config
from policies.files.base_model import load_base
from policies.methods.build import build_trunk
from policies.schema import ModelSettings

ROLES = ("policy", "reference")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=76)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = ModelSettings(path=str(arguments.model))
    trunk = build_trunk(settings, POLICY, ROLES)
    config = lora_config(POLICY, settings.path)
    peft = get_peft_model(load_base(settings), config, adapter_name=ROLES[0])
    peft.add_adapter(ROLES[1], config)
    peft.eval()
    ids = torch.randint(trunk.causal.config.vocab_size, (arguments.rows, arguments.length))

    def by_peft(role: str) -> Tensor:
        peft.set_adapter(role)
        return peft.base_model.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def mixed() -> Tensor:
        names = [role for role in ROLES for _ in range(arguments.rows)]
        with peft._enable_peft_forward_hooks(adapter_names=names):
            both = torch.cat([ids, ids])
            return peft.base_model.model.base_model(input_ids=both, use_cache=False).last_hidden_state

    ways: dict[str, Callable[[], object]] = {
        "ours, a pass each": lambda: [trunk.hidden(ids, role) for role in ROLES],
        "PEFT, a pass each": lambda: [by_peft(role) for role in ROLES],
        "PEFT, one mixed pass": mixed,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(arguments.rounds + 2):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
    for name, spent in seconds.items():
        rest = spent[2:]
        print(f"{name}: {median(rest) * 1e3:.1f} ms ({min(rest) * 1e3:.1f} to {max(rest) * 1e3:.1f})")


if __name__ == "__main__":
    main()
