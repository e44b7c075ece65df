"""Programs whose output nobody reads any more, or cannot be encoded, end as they would otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from align.runtime.streams import lasting_streams
with lasting_streams():
    for number in range(20000):
        print("a → b é", number)
        print("c → d", number, file=sys.stderr)
    open("end", "w").close()
print("after", file=sys.stderr)
sys.exit(5)
"""


def run(folder: Path, environment: dict[str, str], *flags: str, read: int = 0) -> int:
    """Run the program, and close both its streams after reading some bytes. Gives its exit status."""
    with subprocess.Popen(
        [sys.executable, *flags, "-c", PROGRAM],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        for stream in (process.stdout, process.stderr):
            assert stream
            stream.read(read)
            stream.close()
        return process.wait(60)


@pytest.mark.parametrize("flags", [(), ("-u",)])
def test_a_program_goes_on_after_its_readers_are_gone(flags: tuple[str, ...], tmp_path: Path) -> None:
    assert run(tmp_path, {}, *flags, read=10) == 5
    assert (tmp_path / "end").exists()


def test_characters_that_the_encoding_lacks_are_written_in_ascii(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 5
    assert ended.stdout.startswith("a -> b \\xe9 0\na -> b \\xe9 1\n")
    assert ended.stdout.endswith("a -> b \\xe9 19999\n")
    assert ended.stderr.endswith("c -> d 19999\nafter\n")


def test_a_closed_standard_output_is_no_error(tmp_path: Path) -> None:
    ended = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, PROGRAM], cwd=tmp_path, capture_output=True, check=False
    )
    assert ended.returncode == 5


def test_output_that_cannot_be_written_is_one_line_and_status_1(tmp_path: Path) -> None:
    program = PROGRAM.replace("sys.exit(5)", "")
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ended.returncode == 1
    assert (tmp_path / "end").exists()
    assert ended.stderr.endswith(" 19999\nerror: the output cannot be written: No space left on device\n")
