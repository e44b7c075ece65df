"""DeepSpeed around the roles."""

import os
from typing import Any

import torch
import torch.distributed as dist

from align.roles.roles import Roles


def make_deepspeed_engine(roles: Roles, optimizer: torch.optim.Optimizer, stage: int) -> Any:
    """The engine. Clipping, schedules and the count of microbatches are the learner's own."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Each rank is a process that sees one device. ZeRO 3 reads this at every step; `close` takes it back, or
    # transformers' Trainer would take the process for one of a launcher's.
    os.environ["LOCAL_RANK"] = "0"
    import deepspeed

    _without_compiler(deepspeed)
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    engine, *_ = deepspeed.initialize(
        model=roles,
        optimizer=optimizer,
        model_parameters=trainable,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "managed_gradient_accumulation": False,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "zero_optimization": {
                "stage": stage,
                "overlap_comm": False,
                "sub_group_size": 10**12,  # one a parameter group, so that GroupClip sees a group's whole partition
                "stage3_param_persistence_threshold": 0,
            },
        },
    )
    # Gradients of one rank that are whole are what they are: DeepSpeed would copy them to their mean and back.
    engine.enable_backward_allreduce = stage > 0 or dist.get_world_size() > 1
    return engine


def _without_compiler(deepspeed: Any) -> None:
    """Keep DeepSpeed from building its shared-memory operator, which needs a compiler and ninja on the PATH."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
