"""The checks of an installation, and how they are run.

Each runs in an interpreter of its own, with a time limit: a library that cannot be imported, crashes or hangs is a
finding like others, and leaves neither threads nor processes behind.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from align.resources.doctor import child
from align.resources.doctor.cluster import check_cluster, check_local_cluster
from align.resources.doctor.file_names import check_file_names
from align.resources.doctor.finding import Finding, problem
from align.resources.doctor.folders import check_caches, check_runs, check_temporary
from align.resources.doctor.hardware import check_compiler, check_cores, check_device
from align.resources.doctor.packages import (
    check_imports,
    check_optional_packages,
    check_packages,
    check_python,
    check_vllm,
)
from align.resources.doctor.services import check_hub, check_wandb

AT_ONCE = 2
"""Checks that run at the same time: most of their time is that of imports."""
CLEANUP_SECONDS = 10.0
"""Seconds in which a check that has taken too long must have ended, before it is killed."""

INSTALL = "install align and what it needs: pip install -e . in its folder"
REINSTALL = "reinstall the package that the message names; `pip check` names those that do not fit together"
FOLDER = "set another folder: TMPDIR, XDG_CACHE_HOME, HF_HOME, or `runs` of the experiment"
RAY = "free memory and space in TMPDIR and /dev/shm, and end what `ray status` or `ps` shows of earlier clusters"
ADDRESS = "set cluster.address to the address that `ray start --head` prints, and open Ray's ports to this machine"
SERVER = "set HF_HUB_OFFLINE=1 and WANDB_MODE=offline to do without the servers"


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        name: What is checked, in a word or two.
        function: Checks it.
        seconds: How long it may take.
        cure: What is done about it where the check itself fails.
        arguments: What the function takes.
    """

    name: str
    function: Callable[..., Finding]
    seconds: float
    cure: str
    arguments: tuple[str, ...] = ()


def all_checks(runs: str, address: str | None) -> list[Check]:
    """All checks, in the order of the report.

    Args:
        runs: The folder for runs.
        address: The address of a Ray cluster; None: there is none to check.
    """
    checks = [
        Check("Python", check_python, seconds=30, cure=INSTALL),
        Check("packages", check_packages, seconds=30, cure=INSTALL),
        Check("optional packages", check_optional_packages, seconds=30, cure=INSTALL),
        Check("imports", check_imports, seconds=300, cure=REINSTALL),
        Check("vLLM", check_vllm, seconds=300, cure=REINSTALL),
        Check("device", check_device, seconds=120, cure=REINSTALL),
        Check("cores", check_cores, seconds=120, cure=REINSTALL),
        Check("kernels", check_compiler, seconds=180, cure=REINSTALL),
        Check("Ray", check_local_cluster, seconds=180, cure=RAY),
        Check("folder of runs", check_runs, seconds=30, cure=FOLDER, arguments=(runs,)),
        Check("temporary files", check_temporary, seconds=30, cure=FOLDER),
        Check("caches", check_caches, seconds=120, cure=FOLDER),
        Check("hub", check_hub, seconds=30, cure=SERVER),
        Check("W&B", check_wandb, seconds=60, cure=SERVER),
        Check("names of files", check_file_names, seconds=30, cure=REINSTALL),
    ]
    if address:
        checks.append(Check("cluster", check_cluster, seconds=180, cure=ADDRESS, arguments=(address,)))
    return checks


def run_checks(checks: Sequence[Check]) -> dict[str, Finding]:
    """Run checks and give their findings by name, in order."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {check.name: pool.submit(run_check, check) for check in checks}
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run_check(check: Check) -> Finding:
    """Run a check in a child process."""
    setup = {
        "path": sys.path,
        "module": check.function.__module__,
        "function": check.function.__name__,
        "arguments": check.arguments,
    }
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(child.__file__).resolve()), json.dumps(setup)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        reply, messages = process.communicate(timeout=check.seconds)
    except subprocess.TimeoutExpired:
        _end(process)
        return problem(f"no result within {check.seconds:g} s", check.cure)
    if not reply:
        return problem(_how_it_ended(process.returncode, messages), check.cure)
    outcome = json.loads(reply)
    if "failure" in outcome:
        return problem(outcome["failure"], check.cure)
    return Finding(**outcome)


def _end(process: "subprocess.Popen[str]") -> None:
    """End a check, which may clean up first, as a local Ray cluster does."""
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=CLEANUP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def _how_it_ended(status: int, messages: str) -> str:
    """How a child without a result has ended, and the last that it has written."""
    last = next(reversed(messages.strip().splitlines()), "")
    how = f"exit status {status}"
    if status < 0:
        how = f"ended by {signal.Signals(-status).name}"
    return f"{how}: {last}" if last else how
