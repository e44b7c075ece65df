import pickle
import subprocess
import sys

import pytest
import torch

from align.runtime.failures import MicrobatchTooLarge, describe_outside_failure, is_out_of_memory

REFUSED = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to …"
ALLOCATE_TOO_MUCH = """
import resource
import torch
from align.runtime.failures import describe_outside_failure
resource.setrlimit(resource.RLIMIT_AS, (1 << 37, 1 << 37))
try:
    torch.empty(1 << 38, dtype=torch.uint8)
except RuntimeError as error:
    print(describe_outside_failure(error))
"""


def test_a_microbatch_that_is_too_large_says_what_it_held() -> None:
    error = MicrobatchTooLarge(2, 1234, 1, REFUSED)
    assert str(error) == (
        "rank 2 of the learner ran out of memory with a microbatch of 1,234 tokens in 1 sequence: "
        "DefaultCPUAllocator: can't allocate memory: you tried to …"
    )


def test_it_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(MicrobatchTooLarge(0, 30, 2, REFUSED)))
    assert (error.tokens, error.sequences) == (30, 2)
    assert str(error) == str(MicrobatchTooLarge(0, 30, 2, REFUSED))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"), True),
        (RuntimeError(REFUSED), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (ValueError("CUDA out of memory."), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_a_real_refusal_is_described() -> None:
    done = subprocess.run([sys.executable, "-c", ALLOCATE_TOO_MUCH], capture_output=True, text=True, check=True)
    assert "out of memory: " in done.stdout
    assert "`align plan`" in done.stdout


def test_a_programming_error_is_not_described() -> None:
    assert describe_outside_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
