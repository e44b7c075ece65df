"""A Ray cluster that lives as long as a run needs it."""

import logging
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from align.config.schema import ClusterSettings, Experiment
from align.runtime.failures import ClusterLost
from align.runtime.head_watch import connect, head_watched
from policies.device import ComputeSettings, cores
from policies.errors import UserError, first_line

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # By default Ray's workers run at a low priority and would starve next to a busy process.
    "RAY_worker_niceness": "0",
}
"""Defaults for Ray's environment variables; values that the user has set take precedence."""
FOLDER_PREFIX = "align-ray-"
"""What the name of the folder of a cluster's files begins with."""
SOCKET = f"/{FOLDER_PREFIX}12345678/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.0"
"""The longest path of a socket that Ray makes within TMPDIR."""
LONGEST_TMPDIR = (107 if sys.platform == "linux" else 103) - len(SOCKET)
"""Largest number of bytes in TMPDIR's path: the kernel allows only so many in the path of a socket."""
SHORT_FOLDERS = ("/tmp", "/var/tmp")
"""Folders for temporary files that every system has."""
CONNECT_SECONDS = 10.0
"""Seconds in which the head of a cluster must accept a connection."""
TOO_SLOW = "timed out during startup"
"""What Ray says where its processes have not started in 30 s."""
AUTO = "auto"
"""The address that has Ray look for a cluster."""
CLIENT = "ray://"
"""What the addresses of Ray clients begin with."""
WRONG_TOKEN = (
    "the token of this process is missing or wrong: set RAY_AUTH_MODE to `token`, and RAY_AUTH_TOKEN or the file "
    "~/.ray/auth_token to the token that the head of the cluster was started with"
)
"""Why a cluster cannot be joined, and what would be right. Ray 2.60 reads a token only where the mode is set."""
VERSIONS = re.compile(r"Ray: (\S+)\s+Python: (\S+)")
"""Versions in the message of Ray that two of them differ: first those of the head."""

log = logging.getLogger(__name__)

_connection: "_SharedConnection | None" = None
"""The connection that blocks share, within `one_connection`."""


@dataclass
class _SharedConnection:
    """A connection to a cluster, and whether it has been made; the stack ends it."""

    stack: ExitStack
    made: bool = False


@contextmanager
def one_connection() -> Iterator[None]:
    """Let all blocks of `ray_cluster` within the block use one connection to the cluster at `cluster.address`.

    The first of them joins the cluster; each time would take a second or two.
    """
    global _connection
    with ExitStack() as stack:
        _connection = _SharedConnection(stack)
        try:
            yield
        finally:
            _connection = None


@contextmanager
def ray_cluster(settings: ClusterSettings, cpus: int, advice: str = "") -> Iterator[None]:
    """Join the cluster at `cluster.address`, or start a local one that ends with the block.

    The local cluster has no dashboard, picks free ports and keeps its files in a temporary folder, so that runs on one
    machine do not interfere. It offers as many CPUs as the actors reserve, even if the machine has fewer cores: the
    actors share them. If the head of the cluster is lost within the block, the process ends (see `head_watched`).

    Args:
        settings: Section `cluster` of the experiment.
        cpus: CPUs that the actors reserve; 0: nothing is started.
        advice: What the user is told to do where the head of the cluster is lost.

    Raises:
        UserError: The cluster at `cluster.address` cannot be joined; or the path of every folder for temporary files is
            too long for Ray's sockets.
    """
    if not cpus:
        yield
        return
    shared = _connection
    if shared is None or not settings.address_to_join:
        with _connected(settings, cpus, advice):
            yield
        return
    if not shared.made:
        shared.stack.enter_context(_connected(settings, cpus, advice))
        shared.made = True
    yield


@contextmanager
def _connected(settings: ClusterSettings, cpus: int, advice: str) -> Iterator[None]:
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = _find(settings)
    if not address:
        # Task events, which only a dashboard shows, would accumulate in Ray's store by the 100,000.
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    import ray  # reads these variables when it is imported

    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    name = f"cluster.address {address}" if address else "Ray on this machine"
    with ExitStack() as stack:
        with _keep_signal_handlers():
            if address:
                _join(address, options)
            else:
                folder = stack.enter_context(_folder_of_files())
                options |= {"num_cpus": max(cores(), cpus), "include_dashboard": False, "_temp_dir": folder}
                _start(options)
        with head_watched(head_address(settings), name, advice):
            try:
                yield
            finally:
                ray.shutdown()


def _start(options: dict[str, Any]) -> None:
    """Start Ray on this machine.

    Raises:
        ClusterLost: It takes longer than Ray allows.
    """
    import ray

    try:
        ray.init(address="local", **options)
    except Exception as error:  # Ray has no class for it
        if TOO_SLOW not in str(error):
            raise
        raise ClusterLost(
            "Ray has not started on this machine in 30 s: the machine may be too busy. Start the run again, or "
            "`align resume` it, when it is less so"
        ) from error


def _find(settings: ClusterSettings) -> str | None:
    """The address of the cluster to join, where something listens; None: one is to be started on this machine.

    Raises:
        UserError: There is no such cluster.
    """
    address = settings.address_to_join
    if address == AUTO:
        address = _found_by_ray()
        _tell_once(f"cluster.address auto: joining the Ray cluster at {address}")
    elif address and not settings.address:
        _tell_once(f"cluster.address is not set: joining the cluster of this Ray job, at {address}")
    if address:
        _check_address(address)
    return address


@cache
def _tell_once(message: str) -> None:
    """Log a message the first time: a process joins its cluster for the plan, for the dtype and for the run."""
    log.warning(message)


def _found_by_ray() -> str:
    """The address that Ray finds for `auto`: that in RAY_ADDRESS, or of the node that runs on this machine.

    Raises:
        UserError: There is none, or more than one.
    """
    from ray._private.services import canonicalize_bootstrap_address_or_die  # what `ray.init` calls for `auto`

    try:
        return str(canonicalize_bootstrap_address_or_die(AUTO))
    except (ConnectionError, ValueError) as error:
        reason = first_line(error).partition(". ")[0]
        raise UserError(
            f"cluster.address auto: {reason}: start Ray on this machine, set RAY_ADDRESS, or name the address of the "
            "cluster's head"
        ) from error


def _join(address: str, options: dict[str, Any]) -> None:
    """Connect to the cluster at an address.

    Raises:
        UserError: It cannot be joined: there is no cluster, the token is missing or wrong, or versions differ.
    """
    import ray

    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = WRONG_TOKEN if _is_about_token(error) else _differing_versions(error) or first_line(error)
        raise UserError(f"cluster.address {address} cannot be joined: {reason}") from error


def _is_about_token(error: Exception) -> bool:
    """Whether Ray could not connect because a token is missing or wrong."""
    import ray

    return isinstance(error, ray.exceptions.AuthenticationError) or "InvalidAuthToken" in str(error.__cause__)


def _differing_versions(error: Exception) -> str | None:
    """The versions on both sides, where Ray refuses to connect because they differ."""
    versions = VERSIONS.findall(str(error))
    if len(versions) != 2:
        return None
    (head_ray, head_python), (own_ray, own_python) = versions
    return (
        f"its head has Ray {head_ray} and Python {head_python}, this machine Ray {own_ray} and Python {own_python}: "
        "install the head's versions here, or these there"
    )


def head_address(settings: ClusterSettings) -> str:
    """Host and port through which this process is connected to the head of its cluster."""
    import ray

    address = settings.address_to_join
    if address and address.startswith(CLIENT):
        return address.removeprefix(CLIENT)  # the head's other ports may be closed to this machine
    return str(ray.get_runtime_context().gcs_address)


def _check_address(address: str) -> None:
    """Raise UserError where nothing listens at `HOST:PORT`, for which Ray would wait minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "://" in host:
        return  # `auto`, `local` and the addresses of Ray clients are for Ray to find
    try:
        connect(address, CONNECT_SECONDS)
    except OSError as error:
        raise UserError(
            f"cluster.address {address} cannot be reached: {first_line(error)}: set it to the address of the cluster's "
            "head, which `ray start --head` prints"
        ) from error


def _folder_for_sockets() -> str:
    """TMPDIR or, where its path is too long for sockets within it, another folder for temporary files.

    Raises:
        UserError: All paths are too long, or nothing can be written there.
    """
    tmpdir = tempfile.gettempdir()
    for folder in (tmpdir, *SHORT_FOLDERS):
        if len(os.fsencode(folder)) <= LONGEST_TMPDIR and os.access(folder, os.W_OK | os.X_OK):
            if folder != tmpdir:
                log.warning("TMPDIR %s is too long a path for Ray's sockets: Ray's files go to %s", tmpdir, folder)
            return folder
    raise UserError(
        f"TMPDIR {tmpdir} is too long a path for Ray's sockets, and {' and '.join(SHORT_FOLDERS)} cannot be written: "
        f"set TMPDIR to a folder whose path has at most {LONGEST_TMPDIR} bytes"
    )


@contextmanager
def _folder_of_files() -> Iterator[str]:
    """A folder for the files of a local cluster, which is removed where the cluster ends or does not start."""
    folder = tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=_folder_for_sockets())
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _keep_signal_handlers() -> Iterator[None]:
    """Restore the handlers that Ray replaces when it starts: its own end the process at once."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def compute_settings(experiment: Experiment) -> ComputeSettings:
    """How the controller computes."""
    cluster = experiment.cluster
    return ComputeSettings(cluster.threads or cluster.threads_of_environment, experiment.deterministic)
