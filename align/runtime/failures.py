"""Failures that end a run: faults that it detects in its own figures, and failures of storage or of Ray."""

import errno
import re

from safetensors import SafetensorError

from align.runtime.wording import counted
from policies.errors import ActorError, first_line


class Fault(RuntimeError):
    """The run stopped itself, because its figures make it pointless to continue. The message says which."""


class ClusterLost(RuntimeError):
    """The Ray cluster of a job does not answer any more."""


class RankLost(RuntimeError):
    """A rank of the learner has died, or cannot be reached by the others."""


CHECK_SOURCE = re.compile(r"\[enforce fail at \S+\] .*?\. ")
"""Where and what torch has checked, at the start of the message of its CPU allocator."""


class MicrobatchTooLarge(RuntimeError):
    """A rank of the learner has run out of memory with a microbatch.

    Attributes:
        tokens: Tokens of the microbatch, without padding.
        sequences: Its sequences.
    """

    def __init__(self, rank: int, tokens: int, sequences: int, reason: str) -> None:
        """Describe what has failed.

        Args:
            rank: The number of the rank.
            tokens: Tokens of the microbatch, without padding.
            sequences: Its sequences.
            reason: What torch says.
        """
        super().__init__(rank, tokens, sequences, CHECK_SOURCE.sub("", reason))  # what it is pickled by
        self.tokens = tokens
        self.sequences = sequences

    def __str__(self) -> str:
        rank, tokens, sequences, reason = self.args
        microbatch = f"{counted(tokens, 'token')} in {counted(sequences, 'sequence')}"
        return f"rank {rank} of the learner ran out of memory with a microbatch of {microbatch}: {reason}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch's allocator, of a CPU or a GPU, has found no memory."""
    from accelerate.utils.memory import should_reduce_batch_size  # slow to import

    return bool(should_reduce_batch_size(error))


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
    if isinstance(error, Exception) and is_out_of_memory(error):
        return f"out of memory: {first_line(error)}: `align plan` tells what needs how much, and what takes less"
    if type(error).__module__.startswith("ray."):
        return f"Ray is lost: {type(error).__name__}: {first_line(error)}"
    return None
