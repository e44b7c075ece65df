"""What a process can tell of the Ray job that it is part of."""

import os
from itertools import pairwise
from pathlib import Path

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The environment variable that Ray sets for the command of a job, and for nothing else."""
CLUSTER_VARIABLE = "RAY_ADDRESS"
"""The environment variable in which it finds the job's cluster."""
DASHBOARD_VARIABLE = "RAY_API_SERVER_ADDRESS"
"""The environment variable with the address of a cluster's dashboard, which takes its jobs."""
CACHE = ("runtime_resources", "working_dir_files")
"""Ray unpacks a job's working directory in this folder of its own, and deletes it some time after the job."""


def address_of_job() -> str | None:
    """The address of the cluster whose job this process is; None: it is no job's."""
    return os.environ.get(CLUSTER_VARIABLE) if JOB_CONFIG in os.environ else None


def is_in_cache(path: Path) -> bool:
    """Whether a path is in a folder that Ray deletes."""
    parts = path.resolve().parts
    return any(pair == CACHE for pair in pairwise(parts))
