"""The memory of the GPUs of a cluster, which its nodes are asked for."""

import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.resources.placement import GPU

if TYPE_CHECKING:
    import ray

QUERY = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
"""Prints the MiB of each GPU. Through torch, a task without a GPU sees none, and one with a GPU would wait for it."""
QUERY_SECONDS = 10.0
"""How long the command may take on a node."""
REPLY_SECONDS = 60.0
"""How long all nodes together may take, with starting a process on each."""
MEBIBYTE = 2**20


@dataclass(frozen=True)
class GpuMemory:
    """The memory of the GPU that each process has.

    Attributes:
        bytes: The memory.
        node: The address of the node that has no more, where other nodes have more; None: all are alike.
    """

    bytes: float
    node: str | None = None


def smallest_gpu() -> GpuMemory | None:
    """The smallest GPU of the cluster; None where no node tells. Ray must be initialized."""
    smallest: dict[str, int] = {}
    deadline = time.monotonic() + REPLY_SECONDS
    for address, reply in _ask_nodes():
        if found := _smallest_in(reply, deadline - time.monotonic()):
            smallest[address] = min(found, smallest.get(address, found))
    if not smallest:
        return None
    address, memory = min(smallest.items(), key=lambda item: item[1])
    alike = len(set(smallest.values())) == 1
    return GpuMemory(memory, None if alike else address)


def _ask_nodes() -> list[tuple[str, "ray.ObjectRef[str]"]]:
    """Start the query on each node with GPUs, also where all of them are reserved. Returns addresses and replies."""
    import ray  # slow to import
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    query = ray.remote(subprocess.check_output)
    replies = []
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get(GPU):
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = query.options(num_cpus=0, max_retries=0, scheduling_strategy=here)
            replies.append((node["NodeManagerAddress"], task.remote(QUERY, text=True, timeout=QUERY_SECONDS)))
    return replies


def _smallest_in(reply: "ray.ObjectRef[str]", seconds: float) -> int | None:
    """Bytes of the smallest GPU in a node's reply; None where it has no such command, or does not answer in time."""
    import ray

    try:
        return min(int(line) for line in ray.get(reply, timeout=max(0.0, seconds)).splitlines()) * MEBIBYTE
    except (ray.exceptions.RayError, ValueError):
        return None
