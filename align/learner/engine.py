"""The DeepSpeed engine around what is trained."""

import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from align.learner.optimizer import RoleClip
from align.learner.partitions import hold_once
from align.roles.trained import TrainedModule

BUCKET = 2**22
"""Elements of the gradient that the ranks reduce together, 16 MB in float32, and most elements of weights that ZeRO 3
gathers ahead or keeps gathered. DeepSpeed's own limits, 2 GB and more, would undo the savings of stages 2 and 3 for
models below a billion parameters."""


def make_deepspeed_engine(module: TrainedModule, optimizer: torch.optim.Optimizer, stage: int, clip: RoleClip) -> Any:
    """Build the engine.

    The library itself clips gradients, schedules learning rates and counts microbatches.

    Args:
        module: The module to wrap.
        optimizer: The optimizer of the trained parameters.
        stage: The ZeRO stage, 0 to 3.
        clip: Clips the gradients before each step.

    Returns:
        DeepSpeed's engine.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Each rank is a process that sees one device. ZeRO 3 reads this at every step. `Rank.close` removes it, or
    # accelerate would believe that a launcher started this process.
    os.environ["LOCAL_RANK"] = "0"
    import deepspeed

    _without_compiler(deepspeed)
    trainable: list[torch.nn.Parameter] = []
    for group in optimizer.param_groups:
        trainable += group["params"]
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        model_parameters=trainable,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "managed_gradient_accumulation": False,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "zero_optimization": _zero_settings(stage, sum(parameter.numel() for parameter in trainable)),
        },
    )
    # The complete gradients of a single rank need no averaging, for which DeepSpeed would copy them twice.
    engine.enable_backward_allreduce = stage > 0 or dist.get_world_size() > 1
    if stage == 0:
        engine.allreduce_gradients = partial(engine.allreduce_gradients, bucket_size=BUCKET)
        optimizer.register_step_pre_hook(clip)
    else:
        hold_once(engine.optimizer)
        _clip_before_step(engine.optimizer, clip)
    return engine


def destroy_engine(engine: Any) -> None:
    """Free what an engine holds; without this, ZeRO 3 aborts at exit, and keeps the model in memory until then."""
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    engine.destroy()
    # ZeRO 3 leaves modules in two places that last as long as the process: a stack, and the cache of a method, which
    # its decorator hides.
    modules = parameter_offload.FWD_MODULE_STACK
    modules[:] = [module for module in modules if module is not engine.module]
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    method = getattr(coordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(method, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def _zero_settings(stage: int, trained: int) -> dict[str, Any]:
    """DeepSpeed's settings of ZeRO for a number of trained parameters."""
    return {
        "stage": stage,
        "overlap_comm": False,
        "sub_group_size": 10**12,  # one per parameter group, as the optimizer's state is saved
        "reduce_bucket_size": min(BUCKET, trained),
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_max_live_parameters": BUCKET,
        "stage3_max_reuse_distance": BUCKET,
    }


def _clip_before_step(zero: Any, clip: RoleClip) -> None:
    """Clip before the step of DeepSpeed's ZeRO optimizer, which steps the wrapped optimizer once per group.

    A hook of the wrapped optimizer would come too late for all groups but the first.
    """
    step = zero.step

    def clipped_step(*arguments: Any, **named: Any) -> Any:
        clip.clip_partitions(zero)
        return step(*arguments, **named)

    zero.step = clipped_step


def _without_compiler(deepspeed: Any) -> None:
    """Prevent DeepSpeed from building its shared-memory operator, which needs a compiler and ninja on the PATH."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
