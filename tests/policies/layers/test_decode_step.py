"""New tokens by the decode step and by the modules of transformers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from policies.build import make_trunk
from policies.layers.decode_step import DecodeStep
from policies.schema import PolicySettings
from policies.trunk import Trunk
from rollouts.kv_cache import make_cache
from tests.policies.test_families import LLAMA, far_off

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": None},
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 16},
}
PROMPTS = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 20, 21, 22], [0, 30, 31, 32, 33]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
NEW = torch.tensor([[40, 41, 42], [50, 51, 52], [60, 61, 62]])


def make(family: str, dtype: torch.dtype = torch.float32, **config: Any) -> Trunk:
    torch.manual_seed(0)
    model_config = AutoConfig.for_model(family, vocab_size=100, eos_token_id=1, **FAMILIES[family] | config)
    model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    with torch.no_grad():  # biases and gains that are not all alike, so that a lost one shows
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return far_off(make_trunk(model, PolicySettings(rank=4, alpha=8), ("policy", "other")), "policy")


@torch.no_grad()
def decoded(trunk: Trunk, role: str) -> Tensor:
    """States `[B, 3, H]` of three new tokens after prompts padded on the left; the last sequence ends early."""
    trunk.switch(role)
    cache: DynamicCache = make_cache(trunk.causal.config)
    positions = (MASK.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": PROMPTS, "attention_mask": MASK, "position_ids": positions}
    trunk.states(**inputs, past_key_values=cache, use_cache=True)
    mask, states = MASK, []
    for step, ids in enumerate(NEW.T):
        mask = torch.cat([mask, torch.tensor([[1], [1], [int(step < 1)]])], dim=1)
        states.append(trunk.next_states(ids, mask.sum(-1, keepdim=True) - 1, mask, cache))
    return torch.stack(states, dim=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The roles that the decode step was called for."""
    roles: list[str] = []
    original = DecodeStep.__call__

    def counted(self: DecodeStep, role: str, *arguments: Tensor) -> Tensor:
        roles.append(role)
        return original(self, role, *arguments)

    monkeypatch.setattr(DecodeStep, "__call__", counted)
    return roles


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decode_step_gives_the_states_of_the_model(family: str, calls: list[str]) -> None:
    trunk = make(family)
    expected = decoded(trunk, "policy")
    assert not calls
    trunk.merge("policy")
    calls.clear()
    torch.testing.assert_close(decoded(trunk, "policy"), expected, rtol=1e-4, atol=1e-4)
    assert calls == ["policy"] * 3


def test_half_precision_stays_close(calls: list[str]) -> None:
    trunk = make("llama", torch.bfloat16, hidden_size=64)
    expected = decoded(trunk, "policy")
    trunk.merge("policy")
    calls.clear()
    made = decoded(trunk, "policy")
    assert calls == ["policy"] * 3
    assert made.dtype == torch.bfloat16
    assert (made - expected).float().norm() < 0.02 * expected.float().norm()


def test_it_follows_the_adapter_and_serves_merged_roles_alone(calls: list[str]) -> None:
    trunk = make("llama")
    other = decoded(trunk, "other")
    trunk.merge("policy")
    calls.clear()
    trunk.write_adapter("policy", trunk.read_adapter("other"))
    torch.testing.assert_close(decoded(trunk, "policy"), other)
    torch.testing.assert_close(decoded(trunk, "other"), other)
    assert not calls
    trunk.merge("policy")
    torch.testing.assert_close(decoded(trunk, "policy"), other, rtol=1e-4, atol=1e-4)
    assert calls == ["policy"] * 3


@pytest.mark.parametrize("config", [{"sliding_window": 4}, {"hidden_act": "gelu"}])
def test_a_model_of_another_kind_is_left_to_its_modules(config: dict[str, Any]) -> None:
    trunk = make("mistral", **config)
    assert not DecodeStep.fits(trunk.causal)
    expected = decoded(trunk, "policy")
    trunk.merge("policy")
    torch.testing.assert_close(decoded(trunk, "policy"), expected, rtol=1e-4, atol=1e-4)


def test_a_decode_step_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = make("llama")
    expected = decoded(trunk, "policy")
    original = DecodeStep.__call__
    monkeypatch.setattr(DecodeStep, "__call__", lambda self, *arguments: original(self, *arguments) * 1.001)
    trunk.merge("policy")
    torch.testing.assert_close(decoded(trunk, "policy"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, {"head_dim": 40, "hidden_size": 72, "intermediate_size": 50}])
def test_a_sequence_is_the_same_alone_and_among_others(dtype: torch.dtype, config: dict[str, Any]) -> None:
    trunk = make("qwen3", dtype, **config)
    trunk.merge("policy")
    trunk.switch("policy")
    ids, threads = torch.randint(0, 100, (9, 1), generator=torch.Generator().manual_seed(0)), torch.get_num_threads()

    def states(rows: list[int], threads: int = threads) -> Tensor:
        cache, mask = make_cache(trunk.causal.config), torch.ones(len(rows), 20, dtype=torch.long)
        keys = torch.randn(9, 2, 20, 2, trunk.causal.config.head_dim, generator=torch.Generator().manual_seed(1))
        for layer in cache.layers:
            layer.update(*keys[rows, :, :19].to(dtype).permute(3, 0, 1, 2, 4))
        torch.set_num_threads(threads)
        return trunk.next_states(ids[rows, 0], torch.full((len(rows), 1), 19), mask, cache)

    with torch.no_grad():
        try:
            together = states([*range(9)])
            for rows in [[0], [3, 8], [5, 6, 7], [8, 1, 2, 3, 4, 0, 7]]:
                assert torch.equal(states(rows), together[rows])
            assert torch.equal(states([*range(9)], threads=1), together)
            assert torch.equal(states([*range(9)], threads=3), together)
        finally:
            torch.set_num_threads(threads)
