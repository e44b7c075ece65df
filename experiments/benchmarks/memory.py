"""Compare the memory of PPO's four roles on one shared base model with that of four separate models.

    python experiments/benchmarks/memory.py --model MODEL

Counts the bytes of all tensors in the process for a random Llama of about 25 M parameters, and computes the same from
`align plan` for one of 7 B in bfloat16. Both sides train LoRA of rank 16 on policy and critic with Adam.
"""

import argparse
import gc
import tempfile
from pathlib import Path

import torch
from inputs import add_model, require_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from align.config.schema import Experiment
from align.resources.memory import estimate_memory, measure
from align.roles.build import Blueprint, RewardRole, build_roles

LORA = {"rank": 16, "alpha": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    arguments = parser.parse_args()
    require_model(parser, arguments.model)
    print("| model | four roles on one base model | four models | ratio |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        small = make_small(arguments.model, Path(folder) / "small")
        planned, separate = figures(small, "float32")
        row("25 M, float32, as planned", planned, separate)
        row("25 M, float32, measured", *measured(small))
        config = LlamaConfig(max_position_embeddings=4096)  # the defaults are Llama 2 7B's
        config.save_pretrained(Path(folder) / "large")
        AutoTokenizer.from_pretrained(arguments.model).save_pretrained(Path(folder) / "large")
        row("7 B, bfloat16, as planned", *figures(Path(folder) / "large", "bfloat16"))


def row(name: str, shared: float, separate: float) -> None:
    print(f"| {name} | {shared / 1e6:,.0f} MB | {separate / 1e6:,.0f} MB | {shared / separate:.2f} |")


def make_small(model: Path, to: Path) -> Path:
    """A random Llama of hidden size 512 with 8 layers, with the given model's tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(
        model, hidden_size=512, intermediate_size=1360, num_hidden_layers=8, head_dim=64
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(to)
    AutoTokenizer.from_pretrained(model).save_pretrained(to)
    return to


def experiment_of(model: Path, dtype: str) -> Experiment:
    settings = {
        "name": "memory",
        "model": {"path": str(model), "dtype": dtype},
        "policy": LORA,
        "rollouts": {"merge": False, "max_num_seqs": 1, "max_prompt_tokens": 1, "max_new_tokens": 1},
    }
    return Experiment.model_validate(settings)


def figures(model: Path, dtype: str) -> tuple[float, float]:
    """Planned bytes of the learner without its sampler: with one shared base model, and with one per role."""
    experiment = experiment_of(model, dtype)
    sizes = measure(experiment.model, experiment.policy)
    shared = 0.0
    for share in estimate_memory(experiment, ["ppo"], sizes):
        if "sampler" not in share.role and "at most" not in share.role and not share.transient:
            shared += share.bytes
    return shared, shared + 3 * sizes.base_bytes


def measured(model: Path) -> tuple[float, float]:
    """Bytes of all tensors after the roles have trained one step, and the same with one base model per role."""
    experiment = experiment_of(model, "float32")
    before = live_tensor_bytes()
    probe = build_roles(Blueprint(experiment.model, experiment.policy, 0, None), None).trunk
    weights = probe.read_adapter("policy")
    head = {"weight": torch.zeros(probe.width), "bias": torch.zeros(1)}
    base = sum(p.numel() * p.element_size() for n, p in probe.causal.named_parameters() if "lora" not in n)
    del probe
    blueprint = Blueprint(experiment.model, experiment.policy, 0, weights, (RewardRole(weights, (head,)),))
    roles = build_roles(blueprint, experiment.ppo.critic)
    del blueprint, weights, head
    trained = [p for p in roles.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.Adam(trained)
    optimizer.step()
    shared = live_tensor_bytes() - before
    return shared, shared + 3 * base


def live_tensor_bytes() -> int:
    """Bytes of the storages of all live tensors."""
    return sum(live_tensors().values())


def live_tensors() -> dict[int, int]:
    """Bytes of the storage of each live tensor, by address."""
    gc.collect()
    storages: dict[int, int] = {}
    for candidate in gc.get_objects():
        if isinstance(candidate, torch.Tensor):
            tensors = [candidate]
            if candidate.is_leaf and candidate.grad is not None:  # which may have no object in Python
                tensors.append(candidate.grad)
            for tensor in tensors:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return storages


if __name__ == "__main__":
    main()
