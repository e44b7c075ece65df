import subprocess
import sys

import pytest

BLOCK = """
import os, signal, sys
from align.runtime.last_words import last_words
with last_words('gone; resume'):
    {}
"""


@pytest.mark.parametrize(
    ("end", "printed"),
    [
        ("pass", False),
        ("sys.exit(3)", False),
        ("raise KeyboardInterrupt", False),
        ("os._exit(1)", True),
        ("os.kill(os.getpid(), signal.SIGKILL)", True),
    ],
)
def test_the_message_is_printed_where_the_process_was_killed(end: str, printed: bool) -> None:
    done = subprocess.run([sys.executable, "-c", BLOCK.format(end)], capture_output=True, text=True, check=False)
    assert ("gone; resume" in done.stderr) == printed
