"""A rank's partitions of the trained weights and of their gradient at ZeRO 1 to 3, each held once.

DeepSpeed is made for weights below float32, of which it keeps a copy in float32. What is trained here is in float32
already:

    weights     the optimizer steps the rank's part of the weights themselves, not a copy
    gradient    is accumulated in one vector per parameter group, which is stepped without being copied first
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor


def hold_once(zero: Any) -> None:
    """Let the optimizer step the weights themselves and the gradient where it is accumulated.

    Args:
        zero: DeepSpeed's ZeRO optimizer (stages 1 to 3), before the first backward pass.
    """
    for copy, weights in zip(partitions(zero), _weights(zero), strict=True):
        copy.data = weights.data
    if not _is_stage_3(zero):
        zero._link_all_hp_params()  # these views of the copies would keep them in memory
        # DeepSpeed's own way of accumulating in one vector, which it takes for weights below float32 only.
        zero._use_compact_grad_partition_buffer = lambda group: True


def partitions(zero: Any) -> list[Tensor]:
    """This rank's flat float32 partition of each parameter group, from DeepSpeed's ZeRO optimizer (stages 1 to 3)."""
    return list(zero.fp32_partitioned_groups_flat if _is_stage_3(zero) else zero.single_partition_of_fp32_groups)


def gradient_partitions(zero: Any) -> list[Tensor]:
    """The gradient of each of `partitions`; a change of it changes the step, which must follow."""
    if not _is_stage_3(zero):
        return [zero.averaged_gradients[number].flat_partition for number in range(len(partitions(zero)))]
    sizes = [partition.numel() for partition in partitions(zero)]
    gradients = list(zero.grad_partitions_flat_buffer.split(sizes))
    for number, gradient in enumerate(gradients):
        zero.averaged_gradients[number] = [gradient]  # instead of its parts, which the step would copy to join them
    return gradients


def _weights(zero: Any) -> list[Tensor]:
    """This rank's flat partition of the weights of each parameter group, as the forward pass uses them."""
    if _is_stage_3(zero):
        return list(zero.fp16_partitioned_groups_flat)
    rank = dist.get_rank()
    return [parts[rank] for parts in zero.parallel_partitioned_bit16_groups]


def _is_stage_3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")
