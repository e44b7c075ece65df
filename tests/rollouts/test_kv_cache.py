import torch
from transformers import Gemma2Config, LlamaConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rollouts.kv_cache import BLOCK, PreallocatedLayer, make_cache


def states(batch: int, new: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values, each `[batch, 2, new, 3]`."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, 2, new, 3, generator=generator)
    values = torch.randn(batch, 2, new, 3, generator=generator)
    return keys, values


def test_holds_what_the_layer_of_transformers_holds() -> None:
    ours = PreallocatedLayer()
    expected = DynamicLayer()
    batch = 4
    for step in range(2 * BLOCK + 5):
        new = states(batch, 7 if step == 0 else 1, step)
        for one, other in zip(ours.update(*new), expected.update(*new)):
            assert torch.equal(one, other)
        assert ours.get_seq_length() == expected.get_seq_length()
        if step in (3, 50, BLOCK + 20):
            keep = torch.tensor([1, 0, 2][: batch - 1])
            ours.batch_select_indices(keep)
            expected.batch_select_indices(keep)
            batch = len(keep)


def test_storage_is_allocated_once_per_block() -> None:
    layer = PreallocatedLayer()
    addresses = {layer.update(*states(2, 1, step))[0].data_ptr() for step in range(BLOCK)}
    assert len(addresses) == 1


def test_plain_layers_are_replaced_and_sliding_ones_are_not() -> None:
    plain = make_cache(LlamaConfig(num_hidden_layers=3)).layers
    assert [type(layer) for layer in plain] == [PreallocatedLayer] * 3
    mixed = make_cache(Gemma2Config(num_hidden_layers=2)).layers
    assert {type(layer) for layer in mixed} == {PreallocatedLayer, DynamicSlidingWindowLayer}
