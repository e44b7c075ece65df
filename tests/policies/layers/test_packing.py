from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig

from policies import probes
from policies.build import make_trunk
from policies.layers.attention import MAX_KERNEL_SIZE
from policies.layers.packing import MAX_LENGTH_RATIO, PackedSequences, PaddedBlock
from policies.schema import PolicySettings
from policies.trunk import Trunk
from tests.policies.gradients import flat_gradients

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=7)
LONG = MAX_KERNEL_SIZE // 8 + 5
"""Tokens of a sequence that is too long for our kernel, in the tiny model, whose head_dim is 8."""


@given(LENGTHS)
def test_sequences_are_padded_and_unpadded(lengths: list[int]) -> None:
    block = PaddedBlock.of(lengths, CPU)
    flat = torch.arange(1.0, 2 * sum(lengths) + 1).view(-1, 2)
    padded = block.pad(flat)
    assert padded.shape == (len(lengths), max(lengths), 2)
    for row, sequence, length in zip(padded, flat.split(lengths), lengths):
        assert torch.equal(row[:length], sequence)
        assert not row[length:].any()
    assert torch.equal(block.unpad(padded), flat)
    assert block.full == (len(set(lengths)) == 1)


@given(LENGTHS)
def test_blocks_have_sequences_of_about_one_length(lengths: list[int]) -> None:
    packed = PackedSequences.of(lengths, CPU)
    remaining = sorted(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])
    assert torch.equal(packed.positions, positions[packed.order])
    assert torch.equal(packed.positions, torch.cat([torch.arange(length) for length in remaining]))
    assert torch.equal(torch.arange(sum(lengths))[packed.order][packed.inverse], torch.arange(sum(lengths)))
    assert packed.cu_seqlens.tolist() == [sum(remaining[:index]) for index in range(len(remaining) + 1)]
    runs = []
    for block in packed.blocks:
        runs.append(remaining[: block.count])
        remaining = remaining[block.count :]
    assert not remaining
    assert packed.sizes == [sum(run) for run in runs]
    assert [block.width for block in packed.blocks] == [max(run) for run in runs]
    assert all(max(run) <= MAX_LENGTH_RATIO * min(run) for run in runs)
    assert all(min(after) > MAX_LENGTH_RATIO * min(run) for run, after in pairwise(runs))


@pytest.fixture
def trunk(tiny_model: Path) -> Trunk:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    made = make_trunk(base, PolicySettings(rank=4), ("policy",))
    with torch.no_grad():
        for index, parameter in enumerate(made.adapter("policy").values()):
            generator = torch.Generator().manual_seed(index)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made


@pytest.mark.parametrize("lengths", [[3, 9, 1, 5], [4, 4], [LONG, 2, LONG - 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_and_gradients_are_those_of_each_sequence_alone(
    trunk: Trunk, lengths: list[int], dtype: torch.dtype
) -> None:
    assert trunk.supports_packing
    trunk.to(dtype).train_only("policy")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, (sum(lengths),), generator=generator)
    weights = torch.randn(sum(lengths), trunk.width, generator=generator)

    def gradients(states: Tensor) -> tuple[Tensor, Tensor]:
        trunk.zero_grad()
        (states.float() * weights).sum().backward()
        return states.detach(), flat_gradients(trunk.adapter("policy").values()).float()

    apart = [trunk.hidden(row.unsqueeze(0), "policy").squeeze(0) for row in ids.split(lengths)]
    expected, expected_gradient = gradients(torch.cat(apart))
    made, gradient = gradients(trunk.hidden_packed(ids, lengths, "policy"))
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert float((made - expected).norm()) <= bound * float(expected.norm())
    assert float((gradient - expected_gradient).norm()) <= bound * float(expected_gradient.norm())


def test_no_layer_sees_padding(trunk: Trunk) -> None:
    sizes = []
    trunk.causal.base_model.layers[0].mlp.register_forward_hook(lambda _, given, __: sizes.append(given[0].shape[:2]))
    trunk.hidden_packed(torch.arange(12), [2, 7, 3], "policy")
    assert sizes == [(1, 12)]
    assert trunk.microbatches([2, 7, 3], 12) == [[0, 2, 1]]
    trunk.supports_packing = False
    trunk.hidden_packed(torch.arange(12), [2, 7, 3], "policy")
    assert sizes[1:] == [(3, 7)]
    assert trunk.microbatches([2, 7, 3], 12) == [[0, 2], [1]]


def test_in_bfloat16_microbatches_have_few_numbers_of_tokens(trunk: Trunk) -> None:
    sizes = []
    trunk.to(torch.bfloat16).causal.base_model.layers[0].mlp.register_forward_hook(
        lambda _, given, __: sizes.append(given[0].shape[1])
    )
    for lengths in ([2, 7, 3], [30], [30, 2], [30, 3]):
        states = trunk.hidden_packed(torch.arange(sum(lengths)), lengths, "policy")
        assert len(states) == sum(lengths)
    assert sizes == [32, 32, 32, 64]


def test_a_model_that_attends_through_a_window_is_padded(tiny_model: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    mistral = AutoModelForCausalLM.from_config(MistralConfig(**sizes, **heads, sliding_window=4))
    assert not make_trunk(mistral, PolicySettings(rank=4), ("policy",)).supports_packing


def test_a_model_that_passes_nothing_on_to_its_attention_is_padded(trunk: Trunk) -> None:
    forward = trunk.causal.base_model.forward
    trunk.causal.base_model.forward = lambda packed=None, **inputs: forward(**inputs)
    assert not probes.supports_packing(trunk)
