"""Leaves a message behind if this process is killed before it can report anything."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

WITNESS = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if not sys.stdin.buffer.read():
    print(sys.argv[1], file=sys.stderr, flush=True)
"""


@contextmanager
def last_words(message: str) -> Iterator[None]:
    """Write a message to standard error if this process dies within the block.

    The kernel kills a process that is out of memory, and Ray ends one whose raylet has died, both without a message.
    A small witness process waits at the other end of a pipe; it prints the message if the pipe closes unexpectedly.

    Args:
        message: The message.
    """
    witness = subprocess.Popen([sys.executable, "-I", "-c", WITNESS, message], stdin=subprocess.PIPE)
    assert witness.stdin
    try:
        yield
    finally:
        witness.stdin.write(b".")
        witness.stdin.close()
        witness.wait()
