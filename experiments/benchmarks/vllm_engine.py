"""Our engine on vLLM against vLLM driven directly with the same requests: response tokens a second.

    python experiments/benchmarks/vllm_engine.py --model MODEL --prompts PROMPTS.jsonl

`make vllm` installs its CPU build. Both sides take turns on the same `vllm.LLM`, adapter, prompts and seeds; ours adds
the making of requests and the reading of tokens and log-probabilities. Writes `vllm_engine.json`.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from policies.files.base_model import load_tokenizer
from policies.methods.build import build_trunk
from policies.schema import ModelSettings, PolicySettings
from rollouts.build import build_engine
from rollouts.engine import Sampling
from rollouts.schema import RolloutSettings
from rollouts.trajectory import Request
from rollouts.transformers_engine import SAMPLER_ROLE
from rollouts.vllm_engine import VllmEngine

POLICY = PolicySettings(rank=16, alpha=32)
NEW, ROWS, PROMPTS = 128, 64, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--to", type=Path, default=Path(__file__).with_name("vllm_engine.json"))
    arguments = parser.parse_args()
    model = ModelSettings(path=arguments.model, dtype="float32")
    rollouts = RolloutSettings(
        engine="vllm", workers=1, max_num_seqs=ROWS, vllm={"max_model_len": 512, "enforce_eager": True}
    )
    engine = build_engine(model, POLICY, rollouts)
    assert isinstance(engine, VllmEngine)
    engine.load_adapter(1, build_trunk(model, POLICY, (SAMPLER_ROLE,)).read_adapter(SAMPLER_ROLE))
    tokenizer = load_tokenizer(arguments.model)
    rows = [json.loads(line) for line in arguments.prompts.read_text().splitlines()[:PROMPTS]]
    requests = [Request("", tuple(tokenizer(row["prompt"])["input_ids"]), seed) for seed, row in enumerate(rows)]
    sampling = Sampling(1.0, NEW)
    prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
    parameters = [engine._parameters(request.seed, sampling) for request in requests]

    def ours() -> int:
        return sum(t.length for t in engine.generate(requests, sampling))

    def direct() -> int:
        outputs = engine.llm.generate(prompts, parameters, lora_request=engine._adapter, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    ours(), direct()
    pairs = [(rate(ours), rate(direct)) for _ in range(arguments.rounds)]
    ratios = sorted(mine / theirs for mine, theirs in pairs)
    results = {
        "ours": [mine for mine, _ in pairs],
        "direct": [theirs for _, theirs in pairs],
        "ratio": {"median": median(ratios), "lowest": ratios[0], "highest": ratios[-1]},
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(results, indent=2))
    arguments.to.write_text(json.dumps(results, indent=2) + "\n")


def rate(generate: Callable[[], int]) -> float:
    """Response tokens a second."""
    start = time.perf_counter()
    return generate() / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
