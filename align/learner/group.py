"""All ranks of a learner behind one interface, and its simplest form: one rank in this process."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar, TypeVarTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore  # torch.distributed has it, but not for type checkers


class Closable(Protocol):
    """An object with resources to free."""

    def close(self) -> None:
        """Free them."""


AnyLearner = TypeVar("AnyLearner", bound=Closable)
Inputs = TypeVarTuple("Inputs")
Result = TypeVar("Result")
Value = TypeVar("Value")


class Ranks(ABC, Generic[AnyLearner]):
    """The ranks of a learner: an object of the same class on each."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of ranks."""

    @abstractmethod
    def call(self, method: Callable[[AnyLearner, *Inputs], Result], *arguments: *Inputs) -> list[Result]:
        """Call a method on all ranks with the same arguments; the results by rank."""

    @abstractmethod
    def scatter(
        self, method: Callable[[AnyLearner, *Inputs], Result], arguments: Sequence[tuple[*Inputs]]
    ) -> list[Result]:
        """Call a method on all ranks, on each with its own arguments; the results by rank."""

    @abstractmethod
    def call_and_keep(self, method: Callable[[AnyLearner, *Inputs], Result], *arguments: *Inputs) -> Sequence[Result]:
        """As `call`, but the result of a rank is fetched whenever it is read."""

    @abstractmethod
    def share(self, values: Sequence[Value]) -> Sequence[Value]:
        """Values for the arguments of calls; a rank fetches those that it reads."""

    @abstractmethod
    def peak_memory(self) -> int | None:
        """The peak memory of a rank's process in bytes; None: it is this process, or the peak is not known."""

    @abstractmethod
    def close(self) -> None:
        """Free the resources of all ranks."""


class LocalRank(Ranks[AnyLearner]):
    """One rank in this process."""

    def __init__(self, build: Callable[[], AnyLearner]) -> None:
        """Form a process group of one process, and build the rank in it."""
        dist.init_process_group(collective_backend(), store=HashStore(), rank=0, world_size=1)
        self.learner = build()

    @property
    def count(self) -> int:
        return 1

    def call(self, method: Callable[[AnyLearner, *Inputs], Result], *arguments: *Inputs) -> list[Result]:
        return [method(self.learner, *arguments)]

    def scatter(
        self, method: Callable[[AnyLearner, *Inputs], Result], arguments: Sequence[tuple[*Inputs]]
    ) -> list[Result]:
        return [method(self.learner, *own) for own in arguments]

    def call_and_keep(self, method: Callable[[AnyLearner, *Inputs], Result], *arguments: *Inputs) -> Sequence[Result]:
        return self.call(method, *arguments)

    def share(self, values: Sequence[Value]) -> Sequence[Value]:
        return values

    def peak_memory(self) -> int | None:
        return None

    def close(self) -> None:
        import deepspeed

        self.learner.close()
        deepspeed.comm.destroy_process_group()  # torch's own would leave DeepSpeed with a group that no longer exists


def collective_backend() -> str:
    """The backend of the collectives: nccl between GPUs, gloo between CPUs."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def deal_by_length(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal sequences out to ranks in order of length, so that all get about the same work.

    Args:
        lengths: Tokens of each sequence.
        ranks: Number of ranks.

    Returns:
        The indices of each rank's sequences, in order of length; empty where there are fewer sequences than ranks.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [by_length[rank::ranks] for rank in range(ranks)]
