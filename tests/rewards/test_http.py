"""Scores over HTTP, from a real server on this machine."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from policies.errors import UserError
from rewards.calls import call_function
from rewards.terms.endpoint import EndpointTerm
from rewards.terms.judge import JudgeTerm
from tests.rewards.servers import Server, says, serving


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def scored(server: Server, count: int = 2, fallback: float | None = None, **settings: Any) -> list[float]:
    term = EndpointTerm(kind="endpoint", url=server.url, **settings)
    return call_function(term.make_function("far"), ["p"] * count, [f"r{i}" for i in range(count)],
                         [{"n": i} for i in range(count)], fallback=fallback).values  # fmt: skip


def graded(server: Server, responses: list[str], **settings: Any) -> list[float]:
    term = JudgeTerm(kind="judge", url=server.url, model="grader", **settings)
    return call_function(term.make_function("grade"), ["p"] * len(responses), responses, [{}] * len(responses)).values


def test_a_scorer_is_sent_prompts_responses_and_columns_in_batches(server: Server) -> None:
    server.reply = lambda body: (200, {"scores": [len(body["prompts"]) + row["n"] for row in body["columns"]]})
    assert scored(server, count=5, batch_size=2) == [2.0, 3.0, 4.0, 5.0, 5.0]
    assert [body["responses"] for _, body, _ in server.requests] == [["r0", "r1"], ["r2", "r3"], ["r4"]]


def test_a_request_is_retried_while_the_server_fails(server: Server) -> None:
    server.reply = lambda body: (503, {}) if len(server.requests) < 3 else (200, {"scores": [1.0, 2.0]})
    assert scored(server) == [1.0, 2.0]
    assert len(server.requests) == 3


def test_a_server_that_keeps_failing_stops_the_run_and_is_named(server: Server) -> None:
    server.reply = lambda body: (500, {})
    with pytest.raises(UserError, match=r"the scorer at http.* raised .*500.*response 0 of the batch"):
        scored(server, retries=0)


def test_a_refused_request_is_not_retried(server: Server) -> None:
    server.reply = lambda body: (401, {})
    with pytest.raises(UserError, match="401"):
        scored(server, count=1)
    assert len(server.requests) == 1


def test_responses_that_cannot_be_scored_get_the_fallback(server: Server) -> None:
    server.reply = lambda body: (
        (400, {}) if "r1" in body["responses"] else (200, {"scores": [7.0] * len(body["prompts"])})
    )
    assert scored(server, count=3, fallback=-1.0) == [7.0, -1.0, 7.0]


@pytest.mark.parametrize("reply", [{"score": [1]}, {"scores": 1}, [1, 2], b"no json"])
def test_a_reply_that_is_not_a_list_of_scores_is_refused(server: Server, reply: Any) -> None:
    server.reply = lambda body: (200, reply)
    with pytest.raises(UserError, match="the scorer at"):
        scored(server)


def test_a_server_that_hangs_times_out(server: Server) -> None:
    def reply_late(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(2)
        return 200, {"scores": [1.0]}

    server.reply = reply_late
    with pytest.raises(UserError, match=r"[Tt]imed? ?out"):
        scored(server, count=1, timeout=0.2, retries=0)


def test_the_key_is_sent_and_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.reply = lambda body: (200, {"scores": [1.0]})
    with pytest.raises(UserError, match="environment variable GRADER_KEY is not set"):
        scored(server, count=1, key_env="GRADER_KEY")
    monkeypatch.setenv("GRADER_KEY", "secret")
    scored(server, count=1, key_env="GRADER_KEY")
    assert server.requests[-1][2] == "Bearer secret"


def test_a_judge_is_shown_prompt_and_response_and_its_last_number_counts(server: Server) -> None:
    server.reply = says("I would give it 7.5/10")
    assert graded(server, ["fine {prompt}"]) == [0.75]
    path, body, _ = server.requests[0]
    assert (path, body["model"], body["temperature"]) == ("/chat/completions", "grader", 0)
    assert "<response>\nfine {prompt}\n</response>" in body["messages"][0]["content"]


def test_a_judges_scale_may_run_down(server: Server) -> None:
    server.reply = says("2")
    assert graded(server, ["r"], scale=(5, 1)) == [0.75]


def test_what_was_graded_is_not_graded_again(server: Server) -> None:
    server.reply = says("5")
    function = JudgeTerm(kind="judge", url=server.url, model="m").make_function("grade")
    for _ in range(2):
        function(["p"] * 3, ["a", "b", "a"], [{}] * 3)
    assert len(server.requests) == 2


@pytest.mark.parametrize("reply", ["good", "", "11", "-1"])
def test_a_judge_that_gives_no_grade_is_refused(server: Server, reply: str) -> None:
    server.reply = says(reply)
    with pytest.raises(UserError, match=r"the judge grader raised ValueError: the judge gave"):
        graded(server, ["r"])


def test_a_column_that_the_instruction_names_and_the_row_lacks_is_reported(server: Server) -> None:
    with pytest.raises(UserError, match=r"names the field 'answer', and the row has prompt, response"):
        graded(server, ["r"], instruction="{answer} {response}")
