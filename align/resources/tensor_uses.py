"""What the processes of a run hold in memory: the records of which the plan of memory consists."""

from collections.abc import Sequence
from dataclasses import dataclass

from align.config.schema import Experiment

Process = tuple[str, str]
"""A stage and a kind of process."""


@dataclass(frozen=True)
class TensorUse:
    """Bytes that one kind of process holds in a stage.

    Attributes:
        stage: Name of the stage.
        process: The kind of process, such as `learner` or `worker`.
        role: What the tensors are for.
        bytes: Their size.
        transient: Whether they exist only while a microbatch is computed.
    """

    stage: str
    process: str
    role: str
    bytes: float
    transient: bool = False

    @property
    def owner(self) -> Process:
        """The stage and the kind of process."""
        return self.stage, self.process


def bytes_by_gpu(experiment: Experiment, uses: Sequence[TensorUse]) -> dict[Process, float]:
    """The bytes on the GPU of each kind of process; on that of a rank, those of the workers that share it, too."""
    sums: dict[Process, float] = {}
    for use in uses:
        sums[use.owner] = sums.get(use.owner, 0.0) + use.bytes
    ranks = experiment.learner.ranks
    if experiment.rollouts.gpus != "shared" or not ranks:
        return sums
    workers = [process for process in sums if process[0] == "ppo" and "worker" in process[1]]
    for worker in workers:
        guests = -(-experiment.rollouts.workers // ranks)
        shared = sums.pop(worker)
        for process in sums:
            if process[0] == "ppo":
                sums[process] += guests * shared
    return sums
