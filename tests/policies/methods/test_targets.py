"""What `policy.targets` may name, for every method that reads it."""

import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from policies.build import make_trunk
from policies.errors import UserError
from policies.method_spec import methods
from policies.methods.compacter_trunk import SLOW
from policies.schema import PolicySettings

METHODS = [name for name, spec in methods().items() if "targets" in spec.reads and not spec.four_bits]
"""qlora has the trunk of lora."""
SETTINGS = {name: PolicySettings(method=name) for name in METHODS} | {"oft": PolicySettings(method="oft", block_size=8)}


def with_targets(method: str, targets: list[str]) -> PolicySettings:
    return SETTINGS[method].model_copy(update={"targets": targets})


def llama(tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, tie_word_embeddings=tied, **sizes)).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4)).eval()


def test_the_methods_that_read_targets_are_these() -> None:
    assert METHODS == ["adalora", "adamix", "bottleneck", "compacter", "ia3", "loha", "lokr", "lora", "oft", "vera"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["o_proj", "lm_head"], ["o_proj", "embed_tokens"]])
@pytest.mark.parametrize("method", METHODS)
def test_the_lm_head_and_the_embeddings_are_refused(method: str, targets: list[str], tied: bool) -> None:
    with pytest.raises(UserError, match=rf"policy\.targets: .*{targets[-1]}.* top_layers, and the embeddings by full"):
        make_trunk(llama(tied), with_targets(method, targets), ("reference", "policy"))


@pytest.mark.parametrize("targets", [".*lm_head", ".*(o_proj|embed_tokens)"])
def test_a_pattern_that_matches_them_is_refused(targets: str) -> None:
    with pytest.raises(UserError, match=r"policy\.targets: .*(lm_head|embed_tokens).*top_layers"):
        make_trunk(llama(), PolicySettings(targets=targets), ("reference", "policy"))


def test_position_embeddings_are_refused() -> None:
    with pytest.raises(UserError, match=r"policy\.targets: transformer\.wpe"):
        make_trunk(gpt2(), PolicySettings(targets=["c_attn", "wpe"]), ("policy",))


@pytest.mark.parametrize("method", METHODS)
def test_a_name_without_a_layer_is_refused_beside_one_that_has_layers(method: str) -> None:
    with pytest.raises(
        UserError,
        match=r"policy\.targets: no layer .* is named q_porj; there are down_proj, gate_proj, k_proj",
    ):
        make_trunk(llama(), with_targets(method, ["o_proj", "q_porj"]), ("policy",))


@pytest.mark.parametrize("targets", [["o_proj"], ["self_attn.o_proj"], ["o_proj", "mlp.down_proj"]])
@pytest.mark.parametrize("method", METHODS)
def test_names_of_layers_are_the_only_ones_adapted(method: str, targets: list[str]) -> None:
    trunk = make_trunk(llama(), with_targets(method, targets), ("policy",))
    endings = tuple(f".{target}" for target in targets)
    layers = {re.split(r"\.(?:lora|bottleneck|ia3|hada|lokr|vera|oft)_", name)[0] for name in trunk.adapter("policy")}
    layers.discard(SLOW)
    assert len(layers) == 2 * len(targets)
    assert all(layer.endswith(endings) for layer in layers)


@pytest.mark.parametrize("method", ["loha", "lokr", "oft"])
def test_transposed_layers_are_refused_where_peft_does_not_adapt_them(method: str) -> None:
    with pytest.raises(UserError, match=rf"policy.method {method}: transformer.h.0.attn.c_attn is a Conv1D.* use lora"):
        make_trunk(gpt2(), PolicySettings(method=method), ("policy",))


def test_vera_adapts_transposed_layers() -> None:
    trunk = make_trunk(gpt2(), PolicySettings(method="vera", rank=4), ("policy",))
    assert len(trunk.adapter("policy")) == 2 * 2 * 4  # two scales, two decoder layers, four linear layers


def test_oft_says_which_block_sizes_divide_all_layers() -> None:
    with pytest.raises(
        UserError, match=r"block_size 32 does not divide the 48 inputs of .*down_proj: .* divisor of 16"
    ):
        make_trunk(llama(), PolicySettings(method="oft"), ("policy",))
