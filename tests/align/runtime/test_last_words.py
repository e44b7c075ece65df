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
    ("end", "said"),
    [
        ("pass", False),
        ("sys.exit(3)", False),
        ("raise KeyboardInterrupt", False),
        ("os._exit(1)", True),
        ("os.kill(os.getpid(), signal.SIGKILL)", True),
    ],
)
def test_the_witness_speaks_where_the_process_could_not(end: str, said: bool) -> None:
    done = subprocess.run([sys.executable, "-c", BLOCK.format(end)], capture_output=True, text=True, check=False)
    assert ("gone; resume" in done.stderr) == said
