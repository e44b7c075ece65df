import torch
from transformers import Gemma2Config, LlamaConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rollouts.kv_cache import BLOCK, RoomyLayer, make_cache


def states(rows: int, new: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, 2, new, 3, generator=generator) for _ in range(2))
    return keys, values


def test_holds_what_the_layer_of_transformers_holds() -> None:
    ours, theirs = RoomyLayer(), DynamicLayer()
    rows = 4
    for step in range(2 * BLOCK + 5):
        new = states(rows, 7 if step == 0 else 1, step)
        for one, other in zip(ours.update(*new), theirs.update(*new)):
            assert torch.equal(one, other)
        assert ours.get_seq_length() == theirs.get_seq_length()
        if step in (3, 50, BLOCK + 20):
            keep = torch.tensor([1, 0, 2][: rows - 1])
            ours.batch_select_indices(keep)
            theirs.batch_select_indices(keep)
            rows = len(keep)


def test_storage_is_made_once_a_block() -> None:
    layer = RoomyLayer()
    places = {layer.update(*states(2, 1, step))[0].data_ptr() for step in range(BLOCK)}
    assert len(places) == 1


def test_plain_layers_are_replaced_and_sliding_ones_are_not() -> None:
    assert [type(layer) for layer in make_cache(LlamaConfig(num_hidden_layers=3)).layers] == [RoomyLayer] * 3
    mixed = make_cache(Gemma2Config(num_hidden_layers=2)).layers
    assert {type(layer) for layer in mixed} == {RoomyLayer, DynamicSlidingWindowLayer}
