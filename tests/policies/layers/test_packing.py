from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig

from policies.layers.attention import SHORT
from policies.layers.packing import MAX_LENGTH_RATIO, PackedSequences, PaddedBlock
from policies.methods.build import make_trunk
from policies.schema import PolicySettings
from policies.trunk import Trunk

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=7)
LONG = SHORT // 8 + 5
"""Tokens of a row that attention to short rows is not for, in the tiny model, whose heads are 8 wide."""


@given(LENGTHS)
def test_rows_are_padded_and_come_back(lengths: list[int]) -> None:
    block = PaddedBlock.of(lengths, CPU)
    flat = torch.arange(1.0, 2 * sum(lengths) + 1).view(-1, 2)
    padded = block.pad(flat)
    assert padded.shape == (len(lengths), max(lengths), 2)
    for own, row, length in zip(padded, flat.split(lengths), lengths):
        assert torch.equal(own[:length], row)
        assert not own[length:].any()
    assert torch.equal(block.unpad(padded), flat)
    assert block.full == (len(set(lengths)) == 1)


@given(LENGTHS)
def test_blocks_are_of_rows_of_about_one_length(lengths: list[int]) -> None:
    rows = PackedSequences.of(lengths, CPU)
    rest = sorted(lengths)
    own = torch.tensor([place for length in lengths for place in range(length)])
    assert torch.equal(rows.positions, own[rows.order])
    assert rows.positions.tolist() == [place for length in rest for place in range(length)]
    assert torch.equal(torch.arange(sum(lengths))[rows.order][rows.back], torch.arange(sum(lengths)))
    assert rows.starts.tolist() == [sum(rest[:row]) for row in range(len(rest) + 1)]
    runs = [[rest.pop(0) for _ in range(block.count)] for block in rows.blocks]
    assert not rest
    assert rows.sizes == [sum(run) for run in runs]
    assert [block.width for block in rows.blocks] == [max(run) for run in runs]
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
def test_states_and_gradients_are_those_of_each_row_alone(trunk: Trunk, lengths: list[int], dtype: torch.dtype) -> None:
    assert trunk.supports_packing
    trunk.to(dtype).train_only("policy")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, (sum(lengths),), generator=generator)
    weights = torch.randn(sum(lengths), trunk.width, generator=generator)

    def gradients(states: Tensor) -> tuple[Tensor, Tensor]:
        trunk.zero_grad()
        (states.float() * weights).sum().backward()
        return states.detach(), torch.cat([p.grad.float().flatten() for p in trunk.adapter("policy").values()])

    apart = [trunk.hidden(row.unsqueeze(0), "policy").squeeze(0) for row in ids.split(lengths)]
    expected, expected_gradient = gradients(torch.cat(apart))
    made, gradient = gradients(trunk.hidden_packed(ids, torch.tensor(lengths), "policy"))
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert float((made - expected).norm()) <= bound * float(expected.norm())
    assert float((gradient - expected_gradient).norm()) <= bound * float(expected_gradient.norm())


def test_no_layer_sees_padding(trunk: Trunk) -> None:
    sizes = []
    trunk.causal.base_model.layers[0].mlp.register_forward_hook(lambda _, given, __: sizes.append(given[0].shape[:2]))
    trunk.hidden_packed(torch.arange(12), torch.tensor([2, 7, 3]), "policy")
    assert sizes == [(1, 12)]
    assert trunk.microbatches([2, 7, 3], 12) == [[0, 2, 1]]
    trunk.supports_packing = False
    trunk.hidden_packed(torch.arange(12), torch.tensor([2, 7, 3]), "policy")
    assert sizes[1:] == [(3, 7)]
    assert trunk.microbatches([2, 7, 3], 12) == [[0, 2], [1]]


def test_in_bfloat16_passes_have_few_numbers_of_tokens(trunk: Trunk) -> None:
    sizes = []
    trunk.to(torch.bfloat16).causal.base_model.layers[0].mlp.register_forward_hook(
        lambda _, given, __: sizes.append(given[0].shape[1])
    )
    for lengths in ([2, 7, 3], [30], [30, 2], [30, 3]):
        states = trunk.hidden_packed(torch.arange(sum(lengths)), torch.tensor(lengths), "policy")
        assert len(states) == sum(lengths)
    assert sizes == [32, 32, 32, 64]


def test_a_model_that_attends_through_a_window_is_padded(tiny_model: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    mistral = AutoModelForCausalLM.from_config(MistralConfig(**sizes, **heads, sliding_window=4))
    assert not make_trunk(mistral, PolicySettings(rank=4), ("policy",)).supports_packing


def test_a_model_that_hands_nothing_on_to_its_attention_is_padded(trunk: Trunk) -> None:
    forward = trunk.causal.base_model.forward
    trunk.causal.base_model.forward = lambda rows=None, **inputs: forward(**inputs)
    assert not trunk._packs()
