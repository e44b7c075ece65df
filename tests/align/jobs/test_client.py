import asyncio
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace

import pytest
from ray.exceptions import RpcError
from ray.job_submission import JobStatus

from align.jobs.client import JobLog, Jobs, _once_there_is_an_agent, exit_status, explanation
from align.jobs.submission import RunOfJob
from align.runtime.ray_job import DASHBOARD_VARIABLE
from policies.errors import UserError


def test_a_given_address_precedes_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DASHBOARD_VARIABLE, "http://127.0.0.1:2")
    with pytest.raises(
        UserError,
        match=r"^--address http://127\.0\.0\.1:1: .*127\.0\.0\.1:1: set it to the address of the cluster's dashboard",
    ):
        Jobs("http://127.0.0.1:1")


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "", "[red]x"])
def test_an_address_of_another_kind_is_refused_at_once(address: str) -> None:
    with pytest.raises(UserError, match=r"^--address .*: expected http://HOST:8265, the address of .*, or auto$"):
        Jobs(address)


@pytest.mark.parametrize("error", [RpcError("timed out", rpc_code=14), RuntimeError("timed out")])
def test_a_cluster_that_does_not_answer_is_the_users_mistake(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(address: str) -> None:
        raise error

    monkeypatch.setattr("align.jobs.client.JobSubmissionClient", fail)
    with pytest.raises(UserError, match=r"^--address auto: timed out$"):
        Jobs("auto")


async def parts(*texts: str, fails: bool = False) -> AsyncIterator[str]:
    for text in texts:
        yield text
    if fails:
        raise RuntimeError("the connection is lost")


def test_what_a_job_writes_is_given_on_once_though_the_connection_is_lost() -> None:
    given: list[str] = []
    log = JobLog(given.append)
    with pytest.raises(RuntimeError, match="lost"):
        asyncio.run(log.read(parts("one ", "tw", fails=True)))
    asyncio.run(log.read(parts("one two", " three")))
    log.take("one two three four")
    assert given == ["one ", "tw", "o", " three", " four"]


class Lost:
    """A client, simulated, of a cluster that has lost the node with the logs of a job that has failed."""

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        metadata = RunOfJob("/runs/x", "python", (), 1, 0).metadata
        return SimpleNamespace(
            submission_id=job_id,
            metadata=metadata,
            status=JobStatus.FAILED,
            start_time=0,
            end_time=1000,
            driver_exit_code=None,
            message="its node has died",
            runtime_env=None,
        )

    def get_job_logs(self, job_id: str) -> str:
        raise RuntimeError("no logs")


def test_a_job_whose_logs_are_lost_has_ended_nevertheless() -> None:
    jobs = object.__new__(Jobs)
    jobs.client = Lost()
    job = jobs.follow("x-1", print, print)
    assert (exit_status(job), explanation(job)) == (1, "its node has died")


class Full(Lost):
    """A client, simulated, of a cluster that has no room for a job for some time, and then loses it."""

    answers = 0

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        self.answers += 1
        details = super().get_job_info(job_id)
        if self.answers < 3:
            details.status = JobStatus.PENDING
            details.message = "waiting for resources"
        return details

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield "line"


def test_a_job_that_does_not_start_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.jobs.client.PENDING_SECONDS", 0.0)
    jobs = object.__new__(Jobs)
    jobs.client = Full()
    notes: list[str] = []
    jobs.follow("x-1", print, notes.append)
    assert notes == ["job x-1 is pending: waiting for resources"]


def test_a_command_for_a_job_can_be_copied_to_a_shell() -> None:
    jobs = object.__new__(Jobs)
    jobs.address = "http://[fe80::1]:8265"
    assert jobs.command("stop", "x-1") == "align jobs stop x-1 --address 'http://[fe80::1]:8265'"


def test_a_cluster_whose_agents_have_not_started_gets_the_job_once_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = RuntimeError("status code 500: No available agent to submit job, please try again later.")
    answers: Iterator[RuntimeError | str] = iter([failure, "job"])
    monkeypatch.setattr("align.jobs.client.STATE_SECONDS", 0.0)

    def submit() -> str:
        answer = next(answers)
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    assert _once_there_is_an_agent(submit) == "job"


@pytest.mark.parametrize(
    ("answer", "message"), [("No available agent", "--dashboard-agent-listen-port"), ("no space left", "no space left")]
)
def test_a_job_that_the_cluster_does_not_take_is_given_up(
    answer: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.jobs.client.AGENT_SECONDS", 0.0)

    def submit() -> str:
        raise RuntimeError(answer)

    with pytest.raises(RuntimeError, match=message):
        _once_there_is_an_agent(submit)
