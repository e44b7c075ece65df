"""Standard output and error that outlive their reader and that take any character."""

import codecs
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

ASCII_FORMS = {"→": "->", "×": "x", "…": "...", "–": "-", "─": "-", "│": "|", "╭": "+", "╮": "+", "╰": "+", "╯": "+"}
"""What is written in place of characters of messages and tables that an encoding lacks."""
ERROR_HANDLER = "align.ascii_forms"


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Let nothing that is printed within the block end the program.

    Once nobody reads a stream any more, as after `| head`, what is written to it goes nowhere. Characters that its
    encoding lacks are written in ASCII, or as escapes. The same holds where writing fails, as on a full disk, but then
    the end of the block says so and exits with status 1, unless the program fails anyway.
    """
    codecs.register_error(ERROR_HANDLER, _ascii_forms)
    failures: list[str] = []
    output = _lasting(sys.stdout, failures)
    error = _lasting(sys.stderr, failures)
    exit_: SystemExit | None = None
    with redirect_stdout(output), redirect_stderr(error):
        try:
            yield
        except SystemExit as ended:
            exit_ = ended
        finally:
            print(end="", flush=True)
            print(end="", file=sys.stderr, flush=True)
        if failures and not (exit_ and exit_.code):
            print(f"error: the output cannot be written: {failures[0]}", file=sys.stderr, flush=True)
            sys.exit(1)
    if exit_:
        raise exit_


def _lasting(stream: TextIO, failures: list[str]) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper) or not _has_descriptor(stream):
        return stream
    stream.flush()
    file = _LastingFile(stream.fileno(), "w", closefd=False)
    file.failures = failures
    return io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),
        encoding=stream.encoding,
        errors=ERROR_HANDLER,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _ascii_forms(error: UnicodeError) -> tuple[str | bytes, int]:
    """A handler of characters that cannot be encoded, see `codecs.register_error`."""
    if isinstance(error, UnicodeEncodeError):
        form = ASCII_FORMS.get(error.object[error.start])
        if form:
            return form, error.start + 1
    return codecs.backslashreplace_errors(error)


def _has_descriptor(stream: TextIO) -> bool:
    try:
        stream.fileno()
    except io.UnsupportedOperation:
        return False
    return True


class _LastingFile(io.FileIO):
    """A file descriptor that leads nowhere once the reader of its pipe is gone, or once it cannot be written.

    Attributes:
        failures: Where the second is recorded.
    """

    failures: list[str]

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.failures.append(error.strerror or str(error))
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes
