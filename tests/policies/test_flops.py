from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from policies.build import make_trunk
from policies.flops import first_trained_layer, peak_flops, training_flops
from policies.schema import PolicySettings
from policies.trunk import Trunk

LENGTHS = (7, 40)


def make(folder: Path, method: str) -> Trunk:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = PolicySettings(method=method, rank=4) if method == "lora" else PolicySettings(method=method)
    return make_trunk(base, settings, ("policy",))


def counted(model: PreTrainedModel, length: int) -> float:
    """What torch counts in a forward and a backward pass; in attention, the products of all pairs of tokens."""
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(length)[None] + 5, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


def test_full_training_takes_what_torch_counts(tiny_model: Path) -> None:
    flops = training_flops(make(tiny_model, "full"), "policy")
    assert flops is not None
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    untouched = model.get_input_embeddings().weight.numel()  # the gradient of a lookup is no product
    for length in LENGTHS:
        masked = flops.per_pair * length**2 / 2
        assert flops.total([length]) - 2 * untouched * length + masked == pytest.approx(
            counted(model, length), rel=0.01
        )


def test_lora_saves_the_gradients_of_the_weights(tiny_model: Path) -> None:
    trunk = make(tiny_model, "lora")
    flops = training_flops(trunk, "policy")
    assert flops is not None
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    adapter = sum(parameter.numel() for parameter in trunk.adapter("policy").values())
    first = base.model.layers[0].self_attn
    unneeded = sum(part.base_layer.weight.numel() for part in (first.q_proj, first.k_proj, first.v_proj))
    unneeded += sum(part.lora_A["default"].weight.numel() for part in (first.q_proj, first.k_proj, first.v_proj))
    for length in LENGTHS:
        beyond = (4 * adapter - 2 * unneeded) * length  # the adapter's other products; gradients of the embeddings
        masked = flops.per_pair * length**2 / 2
        assert flops.total([length]) + beyond + masked == pytest.approx(counted(model, length), rel=1e-6)


def test_sequences_add_up(tiny_model: Path) -> None:
    flops = training_flops(make(tiny_model, "lora"), "policy")
    assert flops is not None
    assert flops.total(LENGTHS) == sum(flops.total([length]) for length in LENGTHS)


def test_no_gradient_reaches_layers_below_the_first_that_is_trained(tiny_model: Path) -> None:
    lora = training_flops(make(tiny_model, "lora"), "policy")
    top = training_flops(make(tiny_model, "top_layers"), "policy")
    assert lora is not None
    assert top is not None
    assert top.per_pair < lora.per_pair


def test_experts_are_not_counted() -> None:
    config = MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    trunk = make_trunk(MixtralForCausalLM(config), PolicySettings(rank=4), ("policy",))
    assert training_flops(trunk, "policy") is None


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["model.layers.3.q.lora_A.weight", "model.layers.2.q.lora_A.weight"], 2),
        (["prompt_embeddings", "model.layers.2.q.lora_A.weight"], 0),
        (["model.layers.2.q.weight", "model.norm.weight", "lm_head.weight"], 2),
        ([], 4),
    ],
)
def test_first_layer_that_a_gradient_reaches(names: list[str], first: int) -> None:
    assert first_trained_layer(names, layers=4) == first


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "tera"),
    [
        ("NVIDIA H200", torch.bfloat16, False, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989),
        ("NVIDIA A100-SXM4-80GB", torch.float32, True, 156),
        ("NVIDIA A100-SXM4-80GB", torch.float32, False, 19.5),
        ("NVIDIA L40S", torch.bfloat16, True, 362),
        ("Tesla T4", torch.float16, True, 65),
    ],
)
def test_peak_of_a_gpu(name: str, dtype: torch.dtype, tf32: bool, tera: float) -> None:
    assert peak_flops(name, dtype, tf32) == tera * 1e12


def test_a_gpu_that_is_not_known_has_no_peak() -> None:
    assert peak_flops("NVIDIA T400 4GB", torch.bfloat16, tf32=False) is None
