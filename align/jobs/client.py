"""Submits jobs to a Ray cluster, and lists, follows and stops them, through the address of its dashboard."""

import asyncio
import logging
import os
import secrets
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import ray
from ray.job_submission import JobStatus, JobSubmissionClient, JobType

from align.jobs.submission import RunOfJob, Submission
from align.resources.placement import Node
from align.resources.ray_cluster import WRONG_TOKEN
from align.resources.reservation import visible
from align.runtime.failures import ClusterLost
from align.runtime.ray_job import DASHBOARD_VARIABLE
from align.runtime.signals import INTERRUPTED
from policies.errors import UserError, first_line

Output = Callable[[str], object]
"""Takes text that a job has written."""
STATE_SECONDS = 0.5
"""How often the state of a job is asked for."""
PENDING_SECONDS = 15.0
"""How long a job may take to start before that is said."""
LOST_SECONDS = 60.0
"""How long the cluster may leave that unanswered."""
AGENT_SECONDS = 60.0
"""How long a cluster may have no agent, which starts jobs, before a job is given up."""
NO_AGENT = "No available agent"
"""What Ray answers meanwhile."""
NOBODY_STARTS_JOBS = (
    "no node of the cluster has an agent that starts jobs. Another cluster on the same machine may hold its port, "
    "52365: `ray start --dashboard-agent-listen-port` sets another"
)
RAY_LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env")
"""Ray's loggers that report each request."""
EXPECTED_ADDRESS = "http://HOST:8265, the address of the cluster's dashboard, or auto"
NOT_FOUND = 127
"""The exit status of a shell that does not find a command."""


@dataclass(frozen=True)
class Job:
    """A job of align's on a cluster.

    Attributes:
        id: Its id.
        run: Its run.
        status: Ray's word for its state: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        exit_status: That of the command; None: it has not ended by itself.
        message: What Ray says of the state.
        started: When it was submitted.
        seconds: How long it has run so far, or ran.
        runtime_env: Its runtime environment.
    """

    id: str
    run: RunOfJob
    status: str
    exit_status: int | None
    message: str
    started: datetime
    seconds: float
    runtime_env: dict[str, Any]

    @property
    def ended(self) -> bool:
        """Whether it has come to its end."""
        return bool(JobStatus(self.status).is_terminal())


class JobLog:
    """Gives on what a job writes, each part once, however often it is read from its beginning."""

    def __init__(self, output: Output) -> None:
        """output: takes the text."""
        self.output = output
        self.written = 0
        """Number of characters given on."""

    async def read(self, parts: AsyncIterator[str]) -> None:
        """Read parts, the first of which is the job's first."""
        start = 0
        async for text in parts:
            self.take(text, start)
            start += len(text)

    def take(self, text: str, start: int = 0) -> None:
        """Give on what is new of a text that begins at a position."""
        new = text[max(0, self.written - start) :]
        self.written = max(self.written, start + len(text))
        if new:
            self.output(new)


class Jobs:
    """The jobs of a cluster."""

    def __init__(self, address: str) -> None:
        """Connect to a cluster.

        Args:
            address: `http://HOST:8265`, the address of the dashboard; or `auto`.

        Raises:
            UserError: It cannot be reached, or asks for another token.
        """
        if address != "auto" and not address.startswith(("http://", "https://")):
            raise UserError(f"--address {address}: expected {EXPECTED_ADDRESS}")
        self.address = address
        os.environ[DASHBOARD_VARIABLE] = address  # Ray prefers it to the address that it is given
        with self._told():
            self.client = JobSubmissionClient(address)
        for name in RAY_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)

    def nodes(self) -> list[Node]:
        """The nodes of the cluster."""
        from ray.util.state import list_nodes

        with self._told():
            states = list_nodes(address=self.client.get_address(), filters=[("state", "=", "ALIVE")], detail=True)
        return [Node(state.node_ip, visible(state.resources_total)) for state in states]

    def submit(self, submission: Submission) -> str:
        """Send a working directory, and start a job in it.

        Returns:
            The id of the job.

        Raises:
            UserError: The cluster does not take it, for example because the working directory is too large.
        """
        runtime_env = dict(submission.runtime_env)
        runtime_env |= {"working_dir": submission.working_dir, "excludes": list(submission.excludes)}
        with self._told():
            submit = partial(
                self.client.submit_job,
                entrypoint=submission.entrypoint,
                submission_id=f"{submission.name}-{secrets.token_hex(3)}",
                runtime_env=runtime_env,
                metadata=submission.run.metadata,
                entrypoint_num_cpus=submission.run.cpus,
                entrypoint_num_gpus=submission.run.gpus,
            )
            return _once_there_is_an_agent(submit)

    def list(self) -> list[Job]:
        """All jobs of align's, the latest first."""
        with self._told():
            details = self.client.list_jobs()
        jobs = []
        for each in details:
            if each.type == JobType.SUBMISSION and (run := RunOfJob.of(each.metadata)):
                jobs.append(_job(each, run))
        return sorted(jobs, key=lambda job: job.started, reverse=True)

    def find(self, job_id: str) -> Job:
        """A job by its id, or by the beginning of it. Raises UserError where no job of align's has it, or several."""
        found = [job for job in self.list() if job.id.startswith(job_id)]
        exact = [job for job in found if job.id == job_id]
        if len(found) != 1 and not exact:
            known = ", ".join(job.id for job in found or self.list()) or "none"
            which = "more than one job's id begins with it" if found else "no job of align's has this id"
            raise UserError(f"{job_id}: {which}; at {self.address} there are: {known}")
        return (exact or found)[0]

    def command(self, name: str, job_id: str) -> str:
        """A command of `align jobs` for a job, as it can be copied to a shell."""
        return shlex.join(["align", "jobs", name, job_id, "--address", self.address])

    def follow(self, job_id: str, output: Output, note: Output) -> Job:
        """Give what a job writes, from its beginning, until it has ended.

        Args:
            job_id: The id of the job.
            output: Takes the text.
            note: Takes what is to be said of a job that does not start.

        Returns:
            The job, at its end.

        Raises:
            ClusterLost: The cluster has not answered for a minute.
        """
        self._await_start(job_id, note)
        log = JobLog(output)
        while not (job := self._job(job_id)).ended:
            with suppress(OSError, RuntimeError):  # a lost connection is made again
                asyncio.run(log.read(self.client.tail_job_logs(job_id)))
            time.sleep(STATE_SECONDS)
        with suppress(OSError, RuntimeError):  # the node that keeps them may be lost
            log.take(self.client.get_job_logs(job_id))
        return job

    def _await_start(self, job_id: str, note: Output) -> None:
        """Wait until a job is no longer pending, or for so long that this is said."""
        deadline = time.monotonic() + PENDING_SECONDS
        while (job := self._job(job_id)).status == JobStatus.PENDING:
            if time.monotonic() > deadline:
                note(f"job {job_id} is pending: {job.message}")
                return
            time.sleep(STATE_SECONDS)

    def stop(self, job_id: str) -> Job:
        """Have a job stop, and wait until it has written its checkpoint and ended.

        Returns:
            The job, at its end.

        Raises:
            ClusterLost: The cluster has not answered for a minute.
        """
        with self._told():
            self.client.stop_job(job_id)
        while not (job := self._job(job_id)).ended:
            time.sleep(STATE_SECONDS)
        return job

    def _job(self, job_id: str) -> Job:
        """The present state of a job of align's."""
        deadline = time.monotonic() + LOST_SECONDS
        while True:
            try:
                details = self.client.get_job_info(job_id)
                break
            except (ConnectionError, RuntimeError) as error:
                if time.monotonic() > deadline:
                    raise ClusterLost(
                        f"{self.address} has not answered for {LOST_SECONDS:g} s: {first_line(error)}; "
                        f"`{self.command('logs', job_id)}` follows the job, if it still runs"
                    ) from error
                time.sleep(STATE_SECONDS)
        run = RunOfJob.of(details.metadata)
        assert run is not None
        return _job(details, run)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Raise UserError for what goes wrong between here and the cluster."""
        try:
            yield
        except ray.exceptions.AuthenticationError as error:
            raise UserError(f"--address {self.address}: {WRONG_TOKEN}") from error
        except ConnectionError as error:
            reason = first_line(error).rstrip(".")
            raise UserError(
                f"--address {self.address}: {reason}: set it to the address of the cluster's dashboard, which "
                "`ray start --head` prints"
            ) from error
        except (ray.exceptions.RayError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"--address {self.address}: {first_line(error)}") from error


def exit_status(job: Job) -> int:
    """The exit status to pass on for a job that has ended."""
    if job.status == JobStatus.STOPPED:
        return INTERRUPTED
    if job.status == JobStatus.SUCCEEDED:
        return 0
    return job.exit_status or 1


def explanation(job: Job) -> str | None:
    """Why a job has failed that could not say so itself; None: it did not, or it could."""
    if job.status != JobStatus.FAILED:
        return None
    if job.exit_status == NOT_FOUND:
        return f"the cluster has no {job.run.python}: set --python to the path of Python there"
    return None if job.exit_status else job.message


def _job(details: Any, run: RunOfJob) -> Job:
    now = time.time()
    start = details.start_time / 1000  # [s]
    end = details.end_time / 1000 if details.end_time else now  # [s]
    return Job(
        id=details.submission_id,
        run=run,
        status=str(details.status.value),
        exit_status=details.driver_exit_code,
        message=details.message or "",
        started=datetime.fromtimestamp(start),
        seconds=end - start,
        runtime_env=details.runtime_env or {},
    )


def _once_there_is_an_agent(submit: Callable[[], str]) -> str:
    """Submit a job to a cluster that may have just started: its agents come last."""
    given_up = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return submit()
        except RuntimeError as error:
            if NO_AGENT not in str(error):
                raise
            if time.monotonic() > given_up:
                raise RuntimeError(NOBODY_STARTS_JOBS) from error
        time.sleep(STATE_SECONDS)
