"""Measure PPO on a GPU in bfloat16, on random models of 0.5 and 3 billion parameters; writes docs/gpu.md.

    python experiments/benchmarks/gpu.py --model MODEL --prompts PROMPTS.jsonl

MODEL provides the tokenizer. Without a GPU the script says so and exits with status 0.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from bench import Variant, Workload, make_model, run_ours
from inputs import add_model, require_model, require_paths
from operations import matrix_rate

SIZES = {"0.5 B": "1536x18", "3 B": "2560x38"}
"""Number of parameters, and WIDTHxLAYERS of a random Llama."""
DOCUMENT = Path(__file__).parents[2] / "docs" / "gpu.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with `prompt`")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU on this machine, so nothing is measured")
        return
    require_model(parser, arguments.model)
    require_paths(parser, arguments.prompts)
    rate = matrix_rate(torch.bfloat16, "cuda", width=4096)
    lines = [
        "# On a GPU",
        "",
        f"`make gpu-check` on one {torch.cuda.get_device_name()}: PPO with LoRA of rank 16 on a bfloat16 base "
        "model, 32 prompts, up to 64 new tokens, four epochs, in one process. "
        f"Matrix products reach {rate / 1e12:.0f} TFLOP/s.",
        "",
        "| parameters | critic | response tokens/s | update's share of that rate | rollout · score · update, s |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, size in SIZES.items():
            model = make_model(size, arguments, Path(folder) / size)
            for critic in ("adapter", "head"):
                result = run_ours(model, Workload(size, 64), Variant(critic, "bfloat16"), arguments)
                share = result["update_operations_per_s"] / rate
                times = " · ".join(f"{result['parts'][part]:.2f}" for part in ("rollout", "score", "update"))
                lines.append(f"| {name} | {critic} | {result['tokens_per_s']:.0f} | {share:.0%} | {times} |")
                print(lines[-1], flush=True)
    DOCUMENT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
