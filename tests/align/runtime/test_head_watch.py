import subprocess
import sys

import pytest

from align.runtime.head_watch import accepts, await_head

SET_UP = """
import socket, subprocess, sys, time, types
from align.runtime import head_watch
head_watch.CHECK_SECONDS = 0.05
failures = 0

def fail(times):
    global head, failures
    head.close()
    failures = 0
    while failures < times:
        time.sleep(0.01)

def come_back():
    global head
    head = socket.create_server(address)
    head.accept()

connect = head_watch.connect

def counted(*arguments):
    global failures
    try:
        connect(*arguments)
    except OSError:
        failures += 1
        raise

head_watch.connect = counted
head = socket.create_server(("127.0.0.1", 0))
address = head.getsockname()
host_and_port = "127.0.0.1:" + str(address[1])
"""
"""A head, and what happens to it."""
BLOCK = """
child = subprocess.Popen(["sleep", "1000"])
with head_watch.head_watched(host_and_port, "cluster.address 127.0.0.1:9", "resume"):
    {}
child.kill()
"""
ACTOR = """
context = types.SimpleNamespace(gcs_address=host_and_port)
sys.modules["ray"] = types.SimpleNamespace(get_runtime_context=lambda: context)
print(head_watch.build_watched(lambda: "built"), flush=True)
head.close()
time.sleep(1000)
"""


def ended(code: str) -> "subprocess.CompletedProcess[str]":
    """Run code beside a head to its end, and to that of its child, which has the same output."""
    return subprocess.run(
        [sys.executable, "-c", SET_UP + code], capture_output=True, text=True, check=False, timeout=60
    )


def test_a_process_whose_head_is_lost_ends_with_one_message_and_its_children() -> None:
    done = ended(BLOCK.format("head.close(); time.sleep(1000)"))
    assert done.returncode == 1
    address = done.stderr.split(", ")[1].split()[0]
    assert done.stderr == (
        f"error: cluster.address 127.0.0.1:9: the head of the cluster, {address}, accepts no connections any more; "
        "resume\n"
    )


def test_an_actor_whose_head_is_lost_ends() -> None:
    done = ended(ACTOR)
    assert (done.returncode, done.stdout) == (1, "built\n")


@pytest.mark.parametrize(
    "within",
    [
        "head.accept(); head.accept()",
        "fail(4); come_back(); fail(4); come_back(); head.accept()",
        "fail(4)",
    ],
    ids=["there", "restarted twice", "lost at the end"],
)
def test_a_process_goes_on_where_the_head_is_there_or_soon_back(within: str) -> None:
    done = ended(BLOCK.format(within))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_head_that_is_back_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [False, False, True]
    monkeypatch.setattr("align.runtime.head_watch.accepts", lambda address: answers.pop(0))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    await_head("127.0.0.1:1")
    assert not answers


def test_a_closed_port_accepts_nothing() -> None:
    assert not accepts("127.0.0.1:1")
