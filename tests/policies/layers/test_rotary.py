from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from policies.build import make_trunk
from policies.layers import rotary
from policies.layers.rotary import RotaryAttentionForward, _Rotation, apply_rotary, install_rotary
from policies.schema import PolicySettings

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES = (
    "arcee", "gemma", "granite", "granitemoe", "llama", "mistral", "mixtral", "phimoe", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe",
)  # fmt: skip


def states(dtype: torch.dtype = torch.float32, width: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, cosines and sines of angles that differ between the halves, as in no family but allowed."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 5, n, width, generator=generator, dtype=dtype).transpose(1, 2) for n in (4, 2))
    angles = torch.randn(2, 5, width, generator=generator, dtype=torch.float64)
    return query.requires_grad_(), key.requires_grad_(), angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("width", [8, 64, 80])
def test_values_and_gradients_are_those_of_transformers(width: int, dtype: torch.dtype, bound: float) -> None:
    query, key, cos, sin = states(dtype, width)
    expected = apply_rotary_pos_emb(query, key, cos, sin)
    rotated = apply_rotary(query, key, cos, sin)
    outers = [torch.randn(part.shape, generator=torch.Generator().manual_seed(1)).to(dtype) for part in expected]
    theirs = [*expected, *torch.autograd.grad(expected, (query, key), outers)]
    for one, other in zip([*rotated, *torch.autograd.grad(rotated, (query, key), outers)], theirs, strict=True):
        assert one.dtype == dtype
        assert (one - other).norm() <= bound * other.norm()


def test_sequences_may_share_their_angles() -> None:
    query, key, cos, sin = states()
    rotated = apply_rotary(query, key, cos[:1], sin[:1])
    torch.testing.assert_close(rotated, apply_rotary_pos_emb(query, key, cos[:1], sin[:1]))


@pytest.mark.parametrize("case", ["part of a head", "another dtype"])
def test_other_cases_are_left_to_transformers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, cos, sin = states()
    if case == "part of a head":
        cos, sin = cos[..., :4], sin[..., :4]
    if case == "another dtype":
        query, key = query.bfloat16(), key.bfloat16()
    calls: list[tuple[Tensor, ...]] = []
    monkeypatch.setattr(rotary, "apply_rotary_pos_emb", lambda *inputs: calls.append(inputs))
    apply_rotary(query, key, cos, sin)
    (inputs,) = calls
    assert all(one is other for one, other in zip(inputs, (query, key, cos, sin), strict=True))


def model_of(family: str, **config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | config), dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def with_cache(model: PreTrainedModel) -> Tensor:
    """States of a prompt and of three tokens after it, which are in a KV cache."""
    ids = torch.arange(3, 23).reshape(2, 10)
    cache = DynamicCache(config=model.config)
    first = model.base_model(input_ids=ids[:, :7], past_key_values=cache, use_cache=True).last_hidden_state
    second = model.base_model(input_ids=ids[:, 7:], past_key_values=cache, use_cache=True).last_hidden_state
    return torch.cat([first, second], dim=1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_it_did(family: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, where the rotation is that of transformers too."""
    model = model_of(family, attn_implementation=implementation)
    expected = with_cache(model)
    install_rotary(model)
    replaced = sum(isinstance(vars(module).get("forward"), RotaryAttentionForward) for module in model.modules())
    assert replaced == 2
    torch.testing.assert_close(with_cache(model), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(rotary, "apply_rotary", apply_rotary_pos_emb)
    assert torch.equal(with_cache(model), expected)


@pytest.mark.parametrize(("family", "window"), [("mistral", 4), ("qwen2", 4), ("qwen3", 4), ("mixtral", 4)])
def test_the_attention_function_is_told_of_a_sliding_window(
    family: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True} if "qwen" in family else {}
    model = model_of(family, sliding_window=window, **kinds)
    options: list[object] = []
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def recorded(*inputs: Any, **named: Any) -> Any:
        options.append(named["sliding_window"])
        return attend(*inputs, **named)

    expected = with_cache(model)
    install_rotary(model)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", recorded)
    torch.testing.assert_close(with_cache(model), expected, rtol=1e-4, atol=1e-5)
    assert options == [window] * 4


@pytest.mark.parametrize("family", ["gemma2", "glm", "gpt_neox", "olmo2", "phi3"])
def test_a_family_that_attends_otherwise_is_left_to_its_modules(family: str) -> None:
    model = model_of(family)
    install_rotary(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_layers_of_a_trunk_use_it_and_no_other_model_does(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    trunk = make_trunk(base, PolicySettings(rank=4), ("policy",))
    calls: list[torch.Size] = []
    rotate = _Rotation.apply

    def recorded(states: Tensor, *angles: Tensor) -> Tensor:
        calls.append(states.shape)
        return rotate(states, *angles)

    monkeypatch.setattr(_Rotation, "apply", recorded)
    ids = torch.arange(3, 12).unsqueeze(0)
    expected = plain.model(input_ids=ids).last_hidden_state
    assert modeling_llama.apply_rotary_pos_emb is apply_rotary_pos_emb
    assert not calls
    torch.testing.assert_close(trunk.hidden(ids, "policy"), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2 * base.config.num_hidden_layers
