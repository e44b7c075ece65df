"""What a child process does: it loads one function and calls it whenever the driver sends a batch.

Batches arrive as pickles, so that dates, decimals and bytes in the columns are what they were. Replies are JSON: the
driver runs nothing that a child sends.
"""

import contextlib
import functools
import importlib
import json
import os
import pickle
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from policies.errors import UserError
from rewards.children.channel import Channel, Closed
from rewards.replies import read_replies
from rewards.spans import read_spans
from rewards.user_functions import (
    SCORE_ARGUMENTS,
    Failure,
    ResultReader,
    ScoreFunction,
    check_parameters,
    describe_exception,
    load_function,
    read_scores,
    score_once,
)

OUR_PACKAGES = ("policies", "rewards", "rollouts", "align")
RESULT_READERS: dict[str, ResultReader] = {"scores": read_scores, "spans": read_spans, "replies": read_replies}
"""What reads the result of a function, by what it returns for each response."""


def serve(setup: dict[str, Any]) -> None:
    """Load the function, say so, and answer batches until an empty message arrives.

    Args:
        setup: `channel`, the file descriptor of the socket; `where`, `key`, `arguments` and `returns` of the function.
    """
    channel = Channel(socket.socket(fileno=setup["channel"]))
    worker = os.getpid()
    function, refusal = _load(setup)
    _end_forked_copy(worker)
    with contextlib.suppress(Closed):
        channel.send(json.dumps({"refused": refusal}).encode())
        while function and (request := channel.receive()):
            outcome = _call(function, request, RESULT_READERS[setup["returns"]])
            _end_forked_copy(worker)
            _tidy()
            channel.send(json.dumps(outcome).encode())


def _load(setup: dict[str, Any]) -> tuple[ScoreFunction | None, str]:
    """The function, or None and why it cannot be loaded or called."""
    where = setup["where"]
    for name in OUR_PACKAGES:  # before the user's folder precedes them on the path
        importlib.import_module(name)
    source = where.rpartition(":")[0]
    if source.endswith(".py"):
        sys.path.insert(0, str(Path(source).resolve().parent))
    try:
        function = load_function(where, setup["key"])
        check_parameters(function, SCORE_ARGUMENTS, where, setup["key"], keywords=setup["arguments"])
    except UserError as error:
        return None, str(error)
    except BaseException as error:
        return None, f"{setup['key']}: {source} cannot be imported: {type(error).__name__}: {error}"
    if setup["arguments"]:
        function = functools.wraps(function)(functools.partial(function, **setup["arguments"]))
    return function, ""


def _call(function: ScoreFunction, request: bytes, read: ResultReader) -> dict[str, Any]:
    """`values`, or `failure` and whether this process should be replaced after it."""
    try:
        prompts, responses, columns = pickle.loads(request)
        outcome = score_once(function, prompts, responses, columns, read=read)
    except BaseException as error:
        outcome = Failure(describe_exception(function, error))
    if isinstance(outcome, Failure):
        return {"failure": str(outcome), "is_exhausted": isinstance(outcome.__cause__, MemoryError)}
    return {"values": outcome}


def _tidy() -> None:
    """Cancel an alarm that the function has left, and write out what it has printed."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the function may have replaced or closed it
            stream.flush()


def _end_forked_copy(worker: int) -> None:
    """End a process that the function has forked and that has returned from it as well."""
    if os.getpid() != worker:
        os._exit(0)
