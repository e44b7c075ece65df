"""Compare this library's vLLM engine with vLLM called directly, in response tokens per second.

    python experiments/benchmarks/vllm_engine.py --model MODEL --prompts PROMPTS.jsonl

`make vllm` installs vLLM's CPU build. Both sides take turns on the same `vllm.LLM`, adapter, prompts and seeds; the
engine also builds the requests and reads tokens and log-probabilities. Writes `vllm_engine.json`.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from inputs import add_model, require_model, require_paths

from policies.build import build_trunk
from policies.files.base_model import load_tokenizer
from policies.schema import ModelSettings, PolicySettings
from rollouts.build import build_engine
from rollouts.engine import Sampling
from rollouts.schema import RolloutSettings
from rollouts.trajectory import Request
from rollouts.transformers_engine import SAMPLER_ROLE
from rollouts.vllm_engine import VllmEngine

POLICY = PolicySettings(rank=16, alpha=32)
MAX_NEW_TOKENS = 128
MAX_NUM_SEQS = 64
PROMPTS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with `prompt`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--to", type=Path, default=Path(__file__).with_name("vllm_engine.json"))
    arguments = parser.parse_args()
    require_model(parser, arguments.model)
    require_paths(parser, arguments.prompts)
    model = ModelSettings(path=str(arguments.model), dtype="float32")
    rollouts = RolloutSettings(
        engine="vllm", workers=1, max_num_seqs=MAX_NUM_SEQS, vllm={"max_model_len": 512, "enforce_eager": True}
    )
    engine = build_engine(model, POLICY, rollouts)
    assert isinstance(engine, VllmEngine)
    engine.load_adapter(1, build_trunk(model, POLICY, (SAMPLER_ROLE,)).read_adapter(SAMPLER_ROLE))
    tokenizer = load_tokenizer(str(arguments.model))
    rows = [json.loads(line) for line in arguments.prompts.read_text().splitlines()[:PROMPTS]]
    requests = [Request("", tuple(tokenizer(row["prompt"])["input_ids"]), seed) for seed, row in enumerate(rows)]
    sampling = Sampling(1.0, MAX_NEW_TOKENS)
    prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
    parameters = [engine._parameters(request, sampling) for request in requests]

    def ours() -> int:
        return sum(t.length for t in engine.generate(requests, sampling))

    def direct() -> int:
        outputs = engine.llm.generate(prompts, parameters, lora_request=engine._adapter, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    ours()  # warm-up
    direct()
    ours_rates: list[float] = []
    direct_rates: list[float] = []
    for _ in range(arguments.rounds):
        ours_rates.append(rate(ours))
        direct_rates.append(rate(direct))
    ratios = sorted(a / b for a, b in zip(ours_rates, direct_rates, strict=True))
    results = {
        "ours": ours_rates,
        "direct": direct_rates,
        "ratio": {"median": median(ratios), "lowest": ratios[0], "highest": ratios[-1]},
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(results, indent=2))
    arguments.to.write_text(json.dumps(results, indent=2) + "\n")


def rate(generate: Callable[[], int]) -> float:
    """Response tokens per second."""
    start = time.perf_counter()
    return generate() / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
