"""The driver's side of a child process: starts it, sends batches, and ends it together with all its descendants."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

from policies.errors import UserError
from rewards.children import keeper
from rewards.children.channel import Channel, Closed
from rewards.children.source import FunctionSource
from rewards.user_functions import Failure

LOAD_SECONDS = 600.0
"""Seconds in which a function must be loaded; it may have to load a model."""
SEND_SECONDS = 60.0
"""Seconds in which a child takes a batch."""
GRACE_SECONDS = 2.0
"""Seconds in which a child may end of its own accord."""
KILL_SECONDS = 15.0
"""Seconds that a keeper gets to kill everything that it keeps; more than it takes."""
OUTPUT_BYTES = 1 << 16
"""How much of what a function prints during a call is shown."""


class ChildProcess:
    """A fresh interpreter that has loaded, or is loading, one function."""

    def __init__(self, source: FunctionSource) -> None:
        self.source = source
        ours, theirs = socket.socketpair()
        output, printed = os.pipe()
        setup = {
            "driver": os.getpid(),
            "channel": theirs.fileno(),
            "path": sys.path,
            "where": source.where,
            "key": source.key,
            "arguments": dict(source.arguments),
            "returns": source.returns,
            "memory_gb": source.memory_gb,
        }
        try:
            self._keeper = subprocess.Popen(
                [sys.executable, "-P", str(Path(keeper.__file__).resolve()), json.dumps(setup)],
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=printed,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )
        except BaseException:
            ours.close()
            os.close(output)
            raise
        finally:
            theirs.close()
            os.close(printed)
        self.channel = Channel(ours)
        self._allowance = OUTPUT_BYTES
        self._printer = Thread(target=self._show_output, args=(output,), daemon=True)
        self._printer.start()

    def wait_until_loaded(self) -> None:
        """Wait until the function is loaded. Raises UserError where it cannot be."""
        source, _, name = self.source.where.rpartition(":")
        try:
            refusal = json.loads(self.channel.receive(LOAD_SECONDS))["refused"]
        except Closed:
            raise UserError(f"{self.source.key}: {source} cannot be imported: {self._how_it_ended()}") from None
        except TimeoutError:
            message = f"{self.source.key}: {source} cannot be imported: it takes longer than {LOAD_SECONDS:g} s"
            raise UserError(f"{message} until {name} is defined") from None
        if refusal:
            raise UserError(refusal)

    def send(self, batch: bytes) -> None:
        """Send a pickled batch. A child that does not take it is found out when its outcome is asked for."""
        self._allowance = OUTPUT_BYTES
        with contextlib.suppress(Closed, TimeoutError):
            self.channel.send(batch, SEND_SECONDS)

    def outcome(self) -> tuple[list[Any] | Failure, bool]:
        """The values that have arrived or why there are none, and whether the child can be sent another batch."""
        try:
            reply = json.loads(self.channel.receive(SEND_SECONDS))
        except (Closed, TimeoutError):
            return Failure(self._how_it_ended()), False
        if "values" in reply:
            return reply["values"], True
        return Failure(reply["failure"]), not reply["is_exhausted"]

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._keeper.poll() is not None

    def ask_to_end(self) -> None:
        """Let the process end of its own accord."""
        with contextlib.suppress(Closed, TimeoutError):
            self.channel.send(b"", GRACE_SECONDS)

    def close(self, grace: float = 0.0) -> None:
        """Kill the process and all its descendants, after giving it some seconds to end."""
        end = time.monotonic() + grace
        while not self.has_ended() and time.monotonic() < end:
            time.sleep(0.002)
        assert self._keeper.stdin
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.write(b"k")
            self._keeper.stdin.close()
        try:
            self._keeper.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        self.channel.close()
        self._printer.join(GRACE_SECONDS)

    def _how_it_ended(self) -> str:
        try:
            status = self._keeper.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return "stopped answering"
        if status <= 128:
            return f"ended its process with status {status}"
        number = status - 128
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        out_of_memory = ", as the kernel does where memory runs out" if name == "SIGKILL" else ""
        return f"had its process ended by {name}{out_of_memory}"

    def _show_output(self, output: int) -> None:
        """Copy what the process prints to standard error, up to a limit for each call."""
        with open(output, "rb", buffering=0) as file:
            while text := file.read(1 << 16):
                shown = text[: max(0, self._allowance)]
                was_within = self._allowance > 0
                self._allowance -= len(text)
                if shown:
                    print(shown.decode(errors="replace"), end="", file=sys.stderr, flush=True)
                if was_within and self._allowance <= 0:
                    print(f"\n{self.source.where}: further output of this call is not shown", file=sys.stderr)
