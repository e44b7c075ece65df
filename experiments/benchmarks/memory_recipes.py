"""Plan the memory of RLHF for models of three sizes on GPUs of three, and write the table of docs/memory.md.

    python experiments/benchmarks/memory_recipes.py

Nothing is run, and no weights are needed: `align plan` counts tensors that have shapes and no content.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.schema import Experiment
from align.resources.gpu_fit import change_settings, compare_with_gpu
from align.resources.memory import estimate_memory, measure
from align.resources.tensor_uses import bytes_by_gpu
from align.runtime.atomic_files import write_text

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
BEGIN = "<!-- recipes: written by experiments/benchmarks/memory_recipes.py -->\n"
END = "<!-- end of recipes -->\n"

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "num_key_value_heads": 8}
MODELS: dict[str, dict[str, Any]] = {
    "0.5 B": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "8 B": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70 B": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""The shapes of Qwen 2.5 0.5 B, Llama 3.1 8 B and Llama 3.1 70 B."""
FOUR_BITS = "policy.method=qlora"
STAGES = ("sft", "reward", "ppo")
SETTINGS: dict[str, Any] = {
    "policy": {"rank": 16, "alpha": 32},
    "data": {"demonstrations": "demonstrations.jsonl", "preferences": "pairs.jsonl", "prompts": "prompts.jsonl"},
    "sft": {"max_tokens": 1024, "tokens_per_microbatch": 8192},
    "reward": {"max_tokens": 1024, "tokens_per_microbatch": 8192},
    "rollouts": {"max_prompt_tokens": 512, "max_new_tokens": 512, "max_num_seqs": 64, "chunk_size": 64},
    "ppo": {"batch_size": 512},
    "learner": {"tokens_per_microbatch": 8192},
}
ON_EIGHT = {"learner.ranks": 4, "learner.zero": 2, "rollouts.workers": 4}
GPUS: dict[str, tuple[float, dict[str, Any]]] = {
    "24 GB": (24e9, {}),
    "48 GB": (48e9, {}),
    "80 GB": (80e9, {}),
    "8 × 80 GB": (80e9, ON_EIGHT),
}
"""The memory of each GPU, and the settings that use all of them."""


@dataclass(frozen=True)
class Recipe:
    """What a model needs on some GPUs.

    Attributes:
        settings: The settings that it takes besides `SETTINGS`.
        bytes: The largest number of bytes on a GPU, by stage.
        fits: Whether all stages fit.
    """

    settings: tuple[str, ...]
    bytes: dict[str, float]
    fits: bool


def main() -> None:
    rows = ["| model | GPUs | settings | SFT | reward | PPO |", "|---|---|---|---|---|---|"]
    for name, shape in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(shape))
            Path(folder, "tokenizer.json").touch()
            for gpus, (gpu_bytes, parallel) in GPUS.items():
                row = describe(name, gpus, plan(folder, parallel, gpu_bytes))
                print(row, flush=True)
                rows.append(row)
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    write_text(DOCUMENT, before + BEGIN + "\n".join(rows) + "\n" + END + rest.split(END)[1])


def plan(model: str, parallel: dict[str, Any], gpu_bytes: float) -> Recipe:
    """Take the advice of the plan until all stages fit, or it has none.

    Advice that quantises comes first: it holds for all stages, and does not go with ZeRO 3.
    """
    values = {"name": "recipe", "model": {"path": model, "dtype": "bfloat16"}} | SETTINGS
    experiment = change_settings(Experiment.model_validate(values), parallel)
    assert experiment is not None
    chosen: dict[str, Any] = {}
    while True:
        fits = compare_with_gpu(experiment, uses_of(experiment), gpu_bytes)
        advised = [fit for fit in fits if fit.settings]
        if not advised:
            settings = tuple(f"{key}={value}" for key, value in (parallel | chosen).items())
            return Recipe(settings, most_bytes(experiment), all(fit.fits for fit in fits))
        for text in max(advised, key=lambda fit: FOUR_BITS in fit.settings).settings:
            key, value = text.split("=")
            chosen[key] = json.loads(value) if value[0] in "0123456789tf" else value
        changed = change_settings(experiment, chosen)
        assert changed is not None
        experiment = changed


def uses_of(experiment: Experiment) -> Sequence[Any]:
    """What the processes of all stages hold."""
    return estimate_memory(experiment, list(STAGES), measure(experiment.model, experiment.policy))


def most_bytes(experiment: Experiment) -> dict[str, float]:
    """The largest number of bytes on a GPU, by stage."""
    most = dict.fromkeys(STAGES, 0.0)
    for (stage, _), size in bytes_by_gpu(experiment, uses_of(experiment)).items():
        most[stage] = max(most[stage], size)
    return most


def describe(model: str, gpus: str, recipe: Recipe) -> str:
    """A row of the table."""
    sizes = " | ".join(f"{recipe.bytes[stage] / 1e9:.1f} GB" for stage in STAGES)
    settings = " ".join(f"`{text}`" for text in recipe.settings).replace("True", "true") or "as below"
    if not recipe.fits:
        settings = "does not fit"
        sizes = " | ".join(["–"] * len(STAGES))
    return f"| {model} | {gpus} | {settings} | {sizes} |"


if __name__ == "__main__":
    main()
