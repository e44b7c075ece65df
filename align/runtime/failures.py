"""Failures that end a run: faults that it detects in its own figures, and failures of storage or of Ray."""

import errno

from safetensors import SafetensorError

from policies.errors import ActorError, first_line


class Fault(RuntimeError):
    """The run stopped itself, because its figures make it pointless to continue. The message says which."""


class ClusterLost(RuntimeError):
    """The Ray cluster of a job does not answer any more."""


class RankLost(RuntimeError):
    """A rank of the learner has died, or cannot be reached by the others."""


STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def describe_outside_failure(error: BaseException) -> str | None:
    """Describe a failure that align has not caused.

    Args:
        error: The exception that ended the run.

    Returns:
        A sentence for the user where storage, the Ray cluster or a process in it failed; otherwise None.
    """
    if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
        return f"{error.filename or 'a file'} cannot be written: {error.strerror}"
    if isinstance(error, SafetensorError) and "os error" in str(error):
        return f"weights cannot be written: {error}"
    if isinstance(error, RankLost | ActorError):
        return str(error)
    if type(error).__module__.startswith("ray."):
        return f"Ray is lost: {type(error).__name__}: {first_line(error)}"
    return None
