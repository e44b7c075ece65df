import subprocess
import sys
from pathlib import Path

import pytest

from policies import memory_meter
from policies.memory_meter import MemoryMeter

MEASURE = """
import numpy as np
from policies.memory_meter import MemoryMeter

def take(megabytes):
    return np.ones(megabytes * 1_000_000, dtype=np.uint8)

take(300)
meter = MemoryMeter()
first = meter.peak()
kept = take(100)
take(50)
print(first, meter.peak(), MemoryMeter().peak())
"""


def test_the_peak_is_of_what_came_after_the_start() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    first, peak, new = map(int, done.stdout.split())
    assert first < 10e6
    assert 145e6 < peak < 175e6
    assert new < 10e6


def test_the_peak_is_unknown_where_the_system_does_not_reset_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_meter, "RESET", Path("/proc/nowhere/clear_refs"))
    assert MemoryMeter().peak() is None
