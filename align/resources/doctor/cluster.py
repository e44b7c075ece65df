"""Checks whether Ray can start on this machine, and what a cluster offers."""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.resources.doctor.finding import Finding, ok, problem, problem_in_words, warning
from align.resources.doctor.packages import DISTRIBUTION, versions
from align.runtime.wording import counted
from policies.errors import UserError, first_line

SHARED_MEMORY = Path("/dev/shm")
"""Where Ray keeps objects on Linux."""
WORKER_SECONDS = 60.0
"""Seconds in which a worker must have started on each node."""
SHOWN_DIFFERENCES = 3
"""Packages of a node that are named where their versions differ from those here."""
RESTART = "mend the other problems first; `pip install --force-reinstall ray` where this one is left"
"""What is done where Ray starts, but not its workers."""


def check_local_cluster() -> Finding:
    """Whether a Ray cluster starts on this machine and runs a task."""
    if not os.access(SHARED_MEMORY, os.W_OK | os.X_OK):
        return problem(
            f"nothing can be written in {SHARED_MEMORY}, without which Ray does not start",
            f"mount -t tmpfs tmpfs {SHARED_MEMORY}; in a container: docker run --shm-size",
        )
    from align.config.schema import ClusterSettings
    from align.resources.ray_cluster import LONGEST_TMPDIR, ray_cluster

    shared_bytes = _free_bytes(SHARED_MEMORY)  # before Ray takes its part
    started = time.monotonic()
    with _notes() as notes:
        try:
            with ray_cluster(ClusterSettings(), cpus=1):
                (_, environment), *_ = _environments()
                seconds = time.monotonic() - started
                object_bytes = _object_bytes()
        except UserError as error:
            return problem_in_words(str(error), "set TMPDIR to another folder")
        except OSError as error:
            return problem(
                f"Ray does not start: {first_line(error)}",
                "set HOME and TMPDIR to folders that can be written: Ray has a token in ~/.ray, and sockets in TMPDIR",
            )
    if isinstance(environment, str):
        return problem(f"a cluster starts on this machine, but no task runs there: {environment}", RESTART)
    if shared_bytes < object_bytes:
        return warning(
            f"{SHARED_MEMORY} has {shared_bytes / 1e9:.2g} GB free, so Ray keeps objects in files, which is slow",
            f"free {object_bytes / 1e9:.2g} GB there; in a container: docker run --shm-size",
        )
    if notes:
        return warning("; ".join(notes), f"set TMPDIR to a folder whose path has at most {LONGEST_TMPDIR} bytes")
    return ok(f"a cluster starts on this machine in {seconds:.0f} s; Ray {versions()['ray']}")


def check_cluster(address: str) -> Finding:
    """Whether the cluster at an address can be joined, and whether its nodes have the same packages as this machine."""
    from align.config.schema import ClusterSettings
    from align.resources.ray_cluster import ray_cluster

    try:
        with ray_cluster(ClusterSettings(address=address), cpus=1):
            from align.resources.placement import describe_nodes
            from align.resources.reservation import cluster_nodes

            nodes = describe_nodes(cluster_nodes())
            environments = _environments()
    except UserError as error:
        return problem_in_words(str(error), "set cluster.address to the address that `ray start --head` prints")
    here = versions()
    token = ", joined with a token" if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    found = f"{nodes}{token}"
    for node, environment in environments:
        if isinstance(environment, str):
            return problem(
                f"{found}. No task runs on {node}: {environment}",
                f"install {DISTRIBUTION}=={here[DISTRIBUTION]} on {node}, and start Ray there from its environment",
            )
        differences = _differences(environment, here)
        if differences:
            return problem(f"{found}. On {node}, {differences}", f"install the same packages on {node} as here")
    return ok(f"{found}; all have Ray {here['ray']}, Python {here['Python']} and the packages of this machine")


def _environments() -> list[tuple[str, Mapping[str, str] | str]]:
    """For each node that is alive: its address, and the versions there or why no task runs there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(versions)
    replies = []
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": there}
            replies.append((node["NodeManagerAddress"], task.options(**options).remote()))
    deadline = time.monotonic() + WORKER_SECONDS
    return [(address, _result(reply, deadline)) for address, reply in replies]


def _result(reply: Any, deadline: float) -> Mapping[str, str] | str:
    """The result of a task, or why there is none."""
    import ray

    try:
        return ray.get(reply, timeout=max(0.0, deadline - time.monotonic()))
    except ray.exceptions.GetTimeoutError:
        return f"its worker has not started within {WORKER_SECONDS:g} s"
    except ray.exceptions.RayTaskError as error:
        return str(error.cause).strip().splitlines()[-1]  # the last line of a traceback on the node
    except ray.exceptions.RayError as error:
        return first_line(error)


def _differences(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """How the packages of a node differ from those of this machine; empty where they do not."""
    words = []
    for name, version in here.items():
        if there.get(name) != version:
            words.append(f"{name} is {there.get(name) or 'missing'} ({version} here)")
    more = len(words) - SHOWN_DIFFERENCES
    if more > 0:
        words = [*words[:SHOWN_DIFFERENCES], f"{counted(more, 'more difference')}"]
    return ", ".join(words)


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_bsize


def _object_bytes() -> float:
    """How much memory Ray has set aside for objects."""
    import ray

    return ray.cluster_resources()["object_store_memory"]


@contextmanager
def _notes() -> Iterator[list[str]]:
    """The warnings that align logs within the block."""
    notes: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("align")
    logger.addHandler(handler)
    try:
        yield notes
    finally:
        logger.removeHandler(handler)
