"""Scores over HTTP, from a real server on this machine."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from policies.errors import UserError
from rewards.http import endpoint, judge
from rewards.terms import EndpointTerm, JudgeTerm
from rewards.user_functions import call_function

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


class Server:
    """Answers as it is told, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answer: Answer = lambda body: (200, {})
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append((self.path, body, self.headers["Authorization"]))
                status, answer = server.answer(body)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, daemon=True)
    thread.start()
    yield made
    made.http.shutdown()
    made.http.server_close()
    thread.join()


def scored(server: Server, count: int = 2, fallback: float | None = None, **settings: Any) -> list[float]:
    term = EndpointTerm(kind="endpoint", url=server.url, **settings)
    return call_function(endpoint(term), ["p"] * count, [f"r{i}" for i in range(count)],
                         [{"n": i} for i in range(count)], fallback=fallback).values  # fmt: skip


def graded(server: Server, responses: list[str], **settings: Any) -> list[float]:
    term = JudgeTerm(kind="judge", url=server.url, model="grader", **settings)
    return call_function(judge(term), ["p"] * len(responses), responses, [{}] * len(responses)).values


def says(text: str) -> Answer:
    return lambda body: (200, {"choices": [{"message": {"content": text}}]})


def test_a_scorer_is_sent_prompts_responses_and_columns_in_batches(server: Server) -> None:
    server.answer = lambda body: (200, {"scores": [len(body["prompts"]) + row["n"] for row in body["columns"]]})
    assert scored(server, count=5, batch=2) == [2.0, 3.0, 4.0, 5.0, 5.0]
    assert [body["responses"] for _, body, _ in server.asked] == [["r0", "r1"], ["r2", "r3"], ["r4"]]


def test_a_server_that_fails_for_a_while_is_asked_again(server: Server) -> None:
    server.answer = lambda body: (503, {}) if len(server.asked) < 3 else (200, {"scores": [1.0, 2.0]})
    assert scored(server) == [1.0, 2.0]
    assert len(server.asked) == 3


def test_a_server_that_goes_on_failing_stops_the_run_and_is_named(server: Server) -> None:
    server.answer = lambda body: (500, {})
    with pytest.raises(UserError, match=r"the scorer at http.* raised .*500.*row 0 of the batch"):
        scored(server, retries=0)


def test_a_refusal_is_not_tried_again(server: Server) -> None:
    server.answer = lambda body: (401, {})
    with pytest.raises(UserError, match="401"):
        scored(server, count=1)
    assert len(server.asked) == 2  # the batch, and its row alone


def test_rows_that_cannot_be_had_get_the_fallback(server: Server) -> None:
    server.answer = lambda body: (
        (400, {}) if "r1" in body["responses"] else (200, {"scores": [7.0] * len(body["prompts"])})
    )
    assert scored(server, count=3, fallback=-1.0) == [7.0, -1.0, 7.0]


@pytest.mark.parametrize("answer", [{"score": [1]}, {"scores": 1}, [1, 2], b"no json"])
def test_an_answer_that_is_no_list_of_scores_is_refused(server: Server, answer: Any) -> None:
    server.answer = lambda body: (200, answer)
    with pytest.raises(UserError, match="the scorer at"):
        scored(server)


def test_a_server_that_hangs_is_given_up(server: Server) -> None:
    server.answer = lambda body: (time.sleep(2), (200, {"scores": [1.0]}))[1]
    with pytest.raises(UserError, match=r"[Tt]imed? ?out"):
        scored(server, count=1, timeout=0.2, retries=0)


def test_the_key_is_sent_and_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer = lambda body: (200, {"scores": [1.0]})
    with pytest.raises(UserError, match="environment variable GRADER_KEY is not set"):
        scored(server, count=1, key_env="GRADER_KEY")
    monkeypatch.setenv("GRADER_KEY", "secret")
    scored(server, count=1, key_env="GRADER_KEY")
    assert server.asked[-1][2] == "Bearer secret"


def test_a_judge_is_shown_prompt_and_response_and_its_last_number_counts(server: Server) -> None:
    server.answer = says("I would give it 7.5/10")
    assert graded(server, ["fine {prompt}"]) == [0.75]
    path, body, _ = server.asked[0]
    assert (path, body["model"], body["temperature"]) == ("/chat/completions", "grader", 0)
    assert "<response>\nfine {prompt}\n</response>" in body["messages"][0]["content"]


def test_a_judges_scale_may_run_down(server: Server) -> None:
    server.answer = says("2")
    assert graded(server, ["r"], scale=(5, 1)) == [0.75]


def test_what_was_graded_is_not_graded_again(server: Server) -> None:
    server.answer = says("5")
    function = judge(JudgeTerm(kind="judge", url=server.url, model="m"))
    for _ in range(2):
        function(["p"] * 3, ["a", "b", "a"], [{}] * 3)
    assert len(server.asked) == 2


@pytest.mark.parametrize("said", ["good", "", "11", "-1"])
def test_a_judge_that_gives_no_grade_is_refused(server: Server, said: str) -> None:
    server.answer = says(said)
    with pytest.raises(UserError, match=r"the judge grader raised ValueError: the judge gave"):
        graded(server, ["r"])


def test_a_column_that_the_instruction_wants_and_the_row_lacks_is_named(server: Server) -> None:
    with pytest.raises(UserError, match=r"asks for 'answer', and the row has prompt, response"):
        graded(server, ["r"], instruction="{answer} {response}")
