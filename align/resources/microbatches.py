"""The tokens per microbatch that a run's processes choose by themselves where the settings leave them open."""

from collections.abc import Mapping

from align.config.schema import Experiment
from align.config.stage import section_of
from policies.microbatches import microbatch_tokens
from policies.trunk import Trunk


def set_microbatches(
    experiment: Experiment, trunk: Trunk, held: Mapping[str, float], gpu_bytes: float | None
) -> Experiment:
    """Set `tokens_per_microbatch` of stages, where it is unset, to what their processes choose.

    Args:
        experiment: The settings, which stay as they are.
        trunk: The experiment's trunk on the meta device.
        held: For each of the stages, the bytes that are taken on a GPU of a process that trains, between microbatches.
        gpu_bytes: Memory of the GPU of each process; None: they compute on CPUs.
    """
    sections = {}
    for stage, size in held.items():
        section = section_of(stage)
        settings = getattr(experiment, section)
        if settings.tokens_per_microbatch is None:
            free = None if gpu_bytes is None else gpu_bytes - size
            tokens = microbatch_tokens(trunk.causal.config, trunk.width, trunk.causal.dtype.itemsize, free)
            sections[section] = settings.model_copy(update={"tokens_per_microbatch": tokens})
    return experiment.model_copy(update=sections)
