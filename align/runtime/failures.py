"""What ends a run besides its end and the user: faults that the run finds in itself, and what fails around it."""

import errno

from safetensors import SafetensorError

from policies.errors import first_line


class Fault(RuntimeError):
    """The run stopped itself: its figures are such that going on would be of no use. The message says which."""


class RankLost(RuntimeError):
    """A rank of the learner has died."""


STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def describe_outside_failure(error: BaseException) -> str | None:
    """What is wrong around a run, in words: its storage, or its Ray cluster; None where the fault is another."""
    if isinstance(error, OSError) and error.errno in STORAGE:
        return f"{error.filename or 'a file'} cannot be written: {error.strerror}"
    if isinstance(error, SafetensorError) and "os error" in str(error):
        return f"weights cannot be written: {error}"
    if isinstance(error, RankLost):
        return str(error)
    if type(error).__module__.startswith("ray."):
        return f"Ray is lost: {type(error).__name__}: {first_line(error)}"
    return None
