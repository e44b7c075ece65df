"""Ray for as long as a stage needs it."""

import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from align.config.schema import ClusterSettings, Experiment
from policies.device import ComputeSettings


@contextmanager
def ray_cluster(settings: ClusterSettings, actors: int) -> Iterator[None]:
    """Join the cluster of `cluster.address`, or start one of our own that ends with the block; nothing without actors.

    Our own has no dashboard, picks free ports and keeps its files in a temporary folder, so that runs side by side
    do not meet. It offers at least one CPU an actor: what shares the cores is the actors' number of threads.
    """
    if not actors:
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's workers give way to every other process unless told otherwise, and would starve beside a busy one.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if not settings.address:  # events of tasks, which only a dashboard shows, pile up in Ray's store by the 100,000
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    import ray

    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    folder = None
    # Ray puts its own in their place, which end the process at once.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if settings.address:
        ray.init(address=settings.address, **quiet)
    else:
        folder = tempfile.mkdtemp(prefix="align-ray-")
        cpus = max(cores(), actors)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, _temp_dir=folder, **quiet)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def threads(settings: ClusterSettings, processes: int) -> int:
    """Threads of each of so many processes that compute at the same time."""
    return settings.threads or max(1, cores() // max(1, processes))


def computing(experiment: Experiment, processes: int) -> ComputeSettings:
    """How each of so many processes computes."""
    deterministic = not torch.cuda.is_available() if experiment.deterministic is None else experiment.deterministic
    return ComputeSettings(threads(experiment.cluster, processes), deterministic)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
