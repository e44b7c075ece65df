"""Compare scoring with two adapters in one forward pass each and in one mixed pass, by PEFT's `adapter_names`.

python experiments/benchmarks/mixed.py --model MODEL
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from bench import POLICY
from inputs import add_model, require_model
from peft import get_peft_model
from torch import Tensor

from policies.build import build_trunk
from policies.files.base_model import load_base
from policies.methods.lora_trunk import lora_config
from policies.schema import ModelSettings

ROLES = ("policy", "reference")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument("--sequences", type=int, default=32, help="sequences per adapter")
    parser.add_argument("--length", type=int, default=76, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    require_model(parser, arguments.model)
    torch.set_num_threads(arguments.threads)
    settings = ModelSettings(path=str(arguments.model), dtype="float32")
    trunk = build_trunk(settings, POLICY, ROLES)
    config = lora_config(POLICY, settings.path)
    peft = get_peft_model(load_base(settings), config, adapter_name=ROLES[0])
    peft.add_adapter(ROLES[1], config)
    peft.eval()
    ids = torch.randint(trunk.causal.config.vocab_size, (arguments.sequences, arguments.length))

    def by_peft(role: str) -> Tensor:
        peft.set_adapter(role)
        return peft.base_model.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def mixed() -> Tensor:
        names = [ROLES[0]] * arguments.sequences + [ROLES[1]] * arguments.sequences
        with peft._enable_peft_forward_hooks(adapter_names=names):
            both = torch.cat([ids, ids])
            return peft.base_model.model.base_model(input_ids=both, use_cache=False).last_hidden_state

    variants: dict[str, Callable[[], object]] = {
        "ours, one pass each": lambda: [trunk.hidden(ids, role) for role in ROLES],
        "PEFT, one pass each": lambda: [by_peft(role) for role in ROLES],
        "PEFT, one mixed pass": mixed,
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with torch.no_grad():
        for _ in range(arguments.rounds + 2):
            for name, variant in variants.items():
                started = time.perf_counter()
                variant()
                seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        timed = times[2:]  # the first two are warm-up
        print(f"{name}: {median(timed) * 1e3:.1f} ms ({min(timed) * 1e3:.1f} to {max(timed) * 1e3:.1f})")


if __name__ == "__main__":
    main()
