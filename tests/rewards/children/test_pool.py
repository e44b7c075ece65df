"""Functions in child processes: whatever they do, the caller gets scores or a reason, and nothing is left running."""

import datetime
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest

from policies.errors import UserError
from rewards.calls import Arguments, Scores, score_batch
from rewards.children.pool import FunctionPool
from rewards.children.source import FunctionSource

KEY = "reward.terms.own.function"


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No descendant of this process outlives a test, zombies included."""
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) == before


def make_pool(folder: Path, text: str, memory_gb: float | None = None, **settings: Any) -> FunctionPool:
    path = folder / "score.py"
    path.write_text(text)
    return FunctionPool(FunctionSource(f"{path}:f", KEY, memory_gb=memory_gb), **settings)


def make_batch(count: int = 3, columns: dict[str, Any] | None = None) -> Arguments:
    rows = [columns or {}] * count
    return Arguments([f"p{i}" for i in range(count)], [f"r{i}" for i in range(count)], rows)


def scored(pool: FunctionPool, batch: Arguments, fallback: float | None = None) -> Scores:
    try:
        return score_batch(pool, batch, fallback, f"{KEY}: {pool.source.where}")
    finally:
        pool.close()


def one_score(pool: FunctionPool) -> float:
    (outcome,) = pool.call([make_batch(1)])
    assert isinstance(outcome, list)
    return outcome[0]


BAD = {
    "never returns": ("    while 'r1' in r: pass\n", "took longer than 1 s"),
    "returns nothing in time": ("    import time\n    if 'r1' in r: time.sleep(60)\n", "took longer than 1 s"),
    "exits": ("    import sys\n    if 'r1' in r: sys.exit(3)\n", r"raised SystemExit: 3 \(.*score\.py:3\)"),
    "ends its process": ("    import os\n    if 'r1' in r: os._exit(3)\n", "ended its process with status 3"),
    "is killed": (
        "    import os\n    if 'r1' in r: os.kill(os.getpid(), 9)\n",
        "had its process ended by SIGKILL, as the kernel does where memory runs out",
    ),
    "kills its group": ("    import os\n    if 'r1' in r: os.killpg(0, 1)\n", "had its process ended by SIGHUP"),
    "is interrupted": (
        "    if 'r1' in r: raise KeyboardInterrupt\n",
        r"raised KeyboardInterrupt \(.*score\.py:2\)",
    ),
    "crashes": (
        "    import ctypes\n    if 'r1' in r: ctypes.string_at(0)\n",
        "had its process ended by SIGSEGV",
    ),
    "eats memory": (
        "    while 'r1' in r: eaten.append(bytes(10**7))\n",
        r"raised MemoryError \(.*score\.py:2\)",
    ),
    "is alarmed": (
        "    import signal, time\n    if 'r1' in r: signal.setitimer(signal.ITIMER_REAL, 0.1); time.sleep(60)\n",
        "had its process ended by SIGALRM",
    ),
    "forks and hangs": (
        "    import os, time\n    while 'r1' in r:\n        os.fork()\n        time.sleep(60)\n",
        "took longer than 1 s",
    ),
}


@pytest.mark.parametrize(("body", "reason"), BAD.values(), ids=BAD)
def test_a_call_that_goes_wrong_is_a_reason_or_a_fallback(tmp_path: Path, body: str, reason: str) -> None:
    text = f"def f(p, r, c):\n{body}    return [5.0] * len(r)\n\neaten = []\n"
    pool = make_pool(tmp_path, text, memory_gb=0.5, timeout=1)
    with pytest.raises(
        UserError, match=f"^{KEY}: {tmp_path}/score.py:f {reason}; response 1 of the batch, prompt 'p1'"
    ):
        scored(pool, make_batch())
    scores = scored(pool, make_batch(), fallback=-4.0)
    assert scores.values == [5.0, -4.0, 5.0]
    assert scores.failed == (1,)


def test_a_function_that_forks_scores_once_and_its_daemons_end_with_it(tmp_path: Path) -> None:
    text = """
import os, time

def f(p, r, c):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            open(c[0]["file"], "w").write(str(os.getpid()))
            time.sleep(600)
        os._exit(0)
    os.fork()  # both copies return
    return [float(len(x)) for x in r]
"""
    file = tmp_path / "pid"
    assert scored(make_pool(tmp_path, text), make_batch(columns={"file": str(file)})).values == [2.0, 2.0, 2.0]
    assert not psutil.pid_exists(int(file.read_text()))


def test_a_pool_of_processes_inside_a_function_works_and_ends(tmp_path: Path) -> None:
    text = """
from multiprocessing import Pool

def length(x): return float(len(x))

def f(p, r, c):
    with Pool(2) as pool:
        return pool.map(length, r)
"""
    assert scored(make_pool(tmp_path, text, timeout=20), make_batch()).values == [2.0, 2.0, 2.0]


def test_a_stop_that_reaches_every_process_leaves_a_call_to_the_driver(tmp_path: Path) -> None:
    text = """
import time

def f(p, r, c):
    open(c[0]["file"], "w").close()
    time.sleep(1)
    return [5.0] * len(r)
"""
    file = tmp_path / "called"
    pool = make_pool(tmp_path, text)

    def stop_all() -> None:
        while not file.exists():
            time.sleep(0.01)
        for process in psutil.Process().children(recursive=True):
            process.terminate()  # as Ray stops a job

    stopper = Thread(target=stop_all)
    stopper.start()
    assert scored(pool, make_batch(columns={"file": str(file)})).values == [5.0] * 3
    stopper.join()


def test_a_function_has_the_main_thread_default_handlers_and_no_input(tmp_path: Path) -> None:
    text = """
import os, signal, sys, time

def f(p, r, c):
    if not (forked := os.fork()):
        os._exit(signal.getsignal(signal.SIGTERM) != signal.SIG_DFL)
    assert os.waitpid(forked, 0)[1] == 0
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert sys.stdin.read() == ""
    assert os.environ["OMP_NUM_THREADS"] == c[0]["threads"]
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(1)
    signal.alarm(0)
    return [0.0] * len(r)
"""
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    assert scored(make_pool(tmp_path, text), make_batch(columns={"threads": threads})).values == [0.0] * 3


def test_an_alarm_that_a_call_leaves_does_not_end_the_next_one(tmp_path: Path) -> None:
    text = """
import signal, time

def f(p, r, c):
    time.sleep(c[0]["sleep"])
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    return [0.0] * len(r)
"""
    pool = make_pool(tmp_path, text)
    assert pool.call([make_batch(1, {"sleep": 0}), make_batch(1, {"sleep": 0.5})]) == [[0.0], [0.0]]
    pool.close()


def test_what_a_function_prints_is_shown_up_to_a_limit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = (
        "def f(p, r, c):\n    print('first')\n    for _ in range(20_000): print('x' * 99)\n    return [0.0] * len(r)\n"
    )
    assert scored(make_pool(tmp_path, text), make_batch()).values == [0.0] * 3
    out, err = capfd.readouterr()
    assert not out
    assert err.startswith("first\nxxx")
    assert err.endswith("score.py:f: further output of this call is not shown\n")
    assert len(err) < 70_000


def test_columns_arrive_as_they_are(tmp_path: Path) -> None:
    text = """
import datetime
from decimal import Decimal

def f(p, r, c):
    assert c == [{"day": datetime.date(2026, 2, 3), "price": Decimal("0.10"), "bytes": b"\\0\\xff", "x": float("inf")}]
    return [float(c[0]["price"])]
"""
    columns = {"day": datetime.date(2026, 2, 3), "price": Decimal("0.10"), "bytes": b"\0\xff", "x": float("inf")}
    assert scored(make_pool(tmp_path, text), make_batch(1, columns)).values == [0.1]


def test_columns_that_cannot_be_sent_are_named(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "def f(p, r, c): return [0.0]\n")
    with pytest.raises(UserError, match=f"^{KEY}: the columns cannot be sent to the process of .*score.py:f: .*lambda"):
        scored(pool, make_batch(1, {"f": lambda: 0}))


def test_a_function_keeps_its_state_between_calls_and_loads_torch_only_if_it_imports_it(tmp_path: Path) -> None:
    text = """
import sys

calls = []

def f(p, r, c):
    assert "torch" not in sys.modules and "numpy" not in sys.modules
    calls.append(1)
    return [float(len(calls))] * len(r)
"""
    pool = make_pool(tmp_path, text)
    assert [pool.call([make_batch(1)]) for _ in range(3)] == [[[1.0]], [[2.0]], [[3.0]]]
    pool.close()


def test_several_processes_share_a_batch_and_keep_the_responses_to_one_prompt_together(tmp_path: Path) -> None:
    text = """
import os, time

def f(p, r, c):
    time.sleep(0.3)
    best = {prompt: max(x for q, x in zip(p, r) if q == prompt) for prompt in p}
    return [float(os.getpid() + (x == best[q]) / 2) for q, x in zip(p, r)]
"""
    pool = make_pool(tmp_path, text, parallel=3)
    batch = Arguments([f"p{i // 4}" for i in range(24)], [f"r{i:02}" for i in range(24)], [{}] * 24)
    assert pool.parts(batch) == [range(0, 8), range(8, 16), range(16, 24)]
    scores = scored(pool, batch).values
    processes = [int(score) for score in scores]
    assert len(set(processes)) == 3
    assert all(len(set(processes[start : start + 8])) == 1 for start in (0, 8, 16))
    assert [score % 1 for score in scores] == [0.0, 0.0, 0.0, 0.5] * 6


@pytest.mark.parametrize("count", range(1, 12))
@pytest.mark.parametrize("parallel", [1, 2, 3, 7])
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_parts_cover_a_batch_in_order(count: int, parallel: int, samples: int) -> None:
    pool = FunctionPool(FunctionSource("nothing.py:f", KEY), parallel)
    batch = Arguments([f"p{i // samples}" for i in range(count)], ["r"] * count, [{}] * count)
    parts = pool.parts(batch)
    assert [i for part in parts for i in part] == list(range(count))
    assert 1 <= len(parts) <= parallel
    assert all(part.start % samples == 0 for part in parts)


def test_several_processes_find_the_responses_that_fail(tmp_path: Path) -> None:
    text = (
        "import os\ndef f(p, r, c):\n    if {'r1', 'r6'} & set(r): os._exit(1)\n    return [float(x[1:]) for x in r]\n"
    )
    scores = scored(make_pool(tmp_path, text, parallel=2), make_batch(8), fallback=-1.0)
    assert scores.values == [0.0, -1.0, 2.0, 3.0, 4.0, 5.0, -1.0, 7.0]
    assert scores.failed == (1, 6)


def test_one_slow_response_does_not_delay_the_verdict_on_the_others(tmp_path: Path) -> None:
    text = "import time\ndef f(p, r, c):\n    while 'r1' in r: pass\n    return [1.0] * len(r)\n"
    pool = make_pool(tmp_path, text, parallel=2, timeout=1, one_by_one=True)
    start = time.monotonic()
    assert scored(pool, make_batch(20), fallback=0.0).failed == (1,)
    assert time.monotonic() - start < 10


def test_an_empty_batch_starts_no_process(tmp_path: Path) -> None:
    assert scored(make_pool(tmp_path, "1 / 0\n"), Arguments([], [], [])) == Scores([])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import sys\nsys.exit(3)\n", r"SystemExit: 3 \(.*score\.py:2\)"),
        ("import os\nos._exit(3)\n", "ended its process with status 3"),
        ("\ndef f(:\n", r"SyntaxError: invalid syntax \(.*score\.py:2\)"),
        ("raise KeyboardInterrupt\n", "KeyboardInterrupt"),
        ("import nowhere_at_all\n", r"No module named 'nowhere_at_all' \(.*score\.py:1\)"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_refused_by_name(tmp_path: Path, text: str, reason: str) -> None:
    pool = make_pool(tmp_path, text)
    with pytest.raises(UserError, match=rf"^{KEY}: {tmp_path}/score\.py cannot be imported: .*{reason}"):
        pool.check()


@pytest.mark.parametrize(
    ("signature", "reason"),
    [
        ("prompts, responses", "too many positional arguments"),
        ("prompts, responses, columns, tokenizer", "missing a required argument: 'tokenizer'"),
        ("prompts, responses, *, columns", "too many positional arguments"),
    ],
)
def test_a_function_that_takes_other_arguments_is_refused_when_it_is_loaded(
    tmp_path: Path, signature: str, reason: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_pool(tmp_path, f"\ndef f({signature}): ...\n").check()
    path = tmp_path / "score.py"
    must = "must take (prompts, responses, columns), and it is"
    assert str(caught.value) == f"{KEY}: {path}:f {must} f({signature}): {reason} ({path}:2)"


@pytest.mark.parametrize(
    "text",
    [
        "def f(*batch): ...",
        "def f(p, r, c=(), scale=1.0): ...",
        "async def f(p, r, c): ...",
        "class F:\n    def __call__(self, p, r, c): ...\nf = F()",
        "f = type",  # has no signature
    ],
)
def test_whatever_can_be_called_with_the_arguments_passes(tmp_path: Path, text: str) -> None:
    make_pool(tmp_path, text).check()


def test_a_file_imports_what_is_beside_it_and_shadows_no_package_of_ours(tmp_path: Path) -> None:
    (tmp_path / "helper_beside_it.py").write_text("SCORE = 7.0\n")
    (tmp_path / "rewards.py").write_text("1 / 0\n")
    (tmp_path / "align.py").write_text("1 / 0\n")
    text = """
import align
from helper_beside_it import SCORE
from rewards.terms.number import final_number

def f(p, r, c):
    return [SCORE + final_number(x) for x in r]
"""
    assert scored(make_pool(tmp_path, text), make_batch()).values == [7.0, 8.0, 9.0]


def test_a_process_that_is_gone_between_two_calls_is_replaced_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "import os\ndef f(p, r, c): return [float(os.getpid())]\n"
    pool = make_pool(tmp_path, text)
    first = one_score(pool)
    os.kill(int(first), signal.SIGKILL)
    time.sleep(1)
    second = one_score(pool)
    pool.close()
    assert first != second
    assert "has ended between two calls" in caplog.text


def test_a_long_call_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rewards.children.pool._Running.__init__.__defaults__", (0.1,))
    monkeypatch.setattr("rewards.children.pool.CHILD_POLL_SECONDS", 0.05)
    pool = make_pool(tmp_path, "import time\ndef f(p, r, c):\n    time.sleep(0.6)\n    return [0.0]\n")
    scored(pool, make_batch(1))
    assert f"{KEY}: a call of {tmp_path}/score.py:f has taken 0 s; no time limit is set" in caplog.text


DRIVER = """
import os, sys, time
from rewards.calls import Arguments
from rewards.children.pool import FunctionPool
from rewards.children.source import FunctionSource

pool = FunctionPool(FunctionSource(sys.argv[1], "key"))
pool.call([Arguments(["p"], ["r"], [{"file": sys.argv[2]}])])
if os.fork() == 0:
    time.sleep(5)  # a copy that has inherited all pipes
    os._exit(0)
print("called", flush=True)
pool.call([Arguments(["p"], ["hang"], [{"file": sys.argv[2]}])])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_a_driver_that_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    text = """
import os, time

def f(p, r, c):
    if r == ["hang"]:
        time.sleep(600)
    forked = os.fork()
    if not forked:
        os.setsid()
        time.sleep(600)
    open(c[0]["file"], "w").write(f"{os.getpid()} {forked} {os.getppid()}")
    return [0.0]
"""
    path = tmp_path / "score.py"
    path.write_text(text)
    command = [sys.executable, "-c", DRIVER, f"{path}:f", str(tmp_path / "pids")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as driver:
        assert driver.stdout
        assert driver.stdout.readline() == b"called\n"
        driver.send_signal(number)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    end = time.monotonic() + 10
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, pids))
