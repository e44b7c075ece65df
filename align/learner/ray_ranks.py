"""The ranks of a learner as Ray actors.

    controller                        actors
    RayRanks.call(method, …)      →   every rank gets the same arguments and works on its share
    RayRanks.scatter(method, …)   →   each rank gets its own arguments
    RayRanks.share(values)        →   a rank fetches those that it reads, from Ray's object store

The ranks form one process group and reduce gradients between themselves.
"""

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import psutil
import ray
import torch.distributed as dist
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError, RayTaskError
from torch._C._distributed_c10d import TCPStore  # torch.distributed has it, but not for type checkers

from align.learner.group import AnyLearner, Inputs, Ranks, Result, Value, collective_backend
from align.runtime.failures import MicrobatchTooLarge, RankLost
from align.runtime.head_watch import build_watched
from policies.device import ActorOptions, ComputeSettings
from policies.errors import actor_failure, first_line
from policies.memory_meter import MemoryMeter

GLOO_SOURCE = re.compile(r"\[\S+:\d+\] ")
"""A line of gloo's source, which its messages name."""
GRACE = 5.0
"""Seconds in which a rank must respond to count as alive."""


class RayRanks(Ranks[AnyLearner]):
    """Ray actors that form one process group."""

    def __init__(self, build: Callable[[], AnyLearner], actors: Sequence[ActorOptions]) -> None:
        """Start the actors, connect them, and build the rank in each of them.

        Args:
            build: Builds the learner of a rank; it is sent to the actors.
            actors: How each rank's actor is started, and how it computes.

        Raises:
            UserError: An actor that is to compute on a GPU finds none.
        """
        self.actors = []
        self.nodes: list[str] = []
        """The address of each rank's node, once it is known."""
        for rank, actor in enumerate(actors):
            self.actors.append(ray.remote(_Rank).options(**actor.options, max_restarts=0).remote(rank))
        try:
            self._connect_and_build(build, [actor.compute for actor in actors])
        except BaseException:
            self.close()  # one that waits for the others would keep its place
            raise

    def _connect_and_build(self, build: Callable[[], AnyLearner], settings: Sequence[ComputeSettings]) -> None:
        self.nodes = self._results([actor.apply.remote(own) for actor, own in zip(self.actors, settings, strict=True)])
        (address,) = self._results([self.actors[0].open_store.remote(self.count)])
        self._results([actor.join.remote(address, self.count) for actor in self.actors])
        shared = ray.put(partial(build_watched, build))
        self._results([actor.build.remote(shared) for actor in self.actors])

    @property
    def count(self) -> int:
        return len(self.actors)

    def call(self, method: Callable[[AnyLearner, *Inputs], Result], *arguments: *Inputs) -> list[Result]:
        shared = ray.put(arguments)
        return self._results([actor.call.remote(method.__name__, shared) for actor in self.actors])

    def scatter(
        self, method: Callable[[AnyLearner, *Inputs], Result], arguments: Sequence[tuple[*Inputs]]
    ) -> list[Result]:
        calls = []
        for actor, own in zip(self.actors, arguments, strict=True):
            calls.append(actor.call.remote(method.__name__, ray.put(own)))
        return self._results(calls)

    def call_and_keep(self, method: Callable[[AnyLearner, *Inputs], Result], *arguments: *Inputs) -> Sequence[Result]:
        shared = ray.put(arguments)
        calls = [actor.call.remote(method.__name__, shared) for actor in self.actors]
        return Stored(calls, get=self._result)

    def share(self, values: Sequence[Value]) -> Sequence[Value]:
        return Stored([ray.put(value) for value in values], get=fetch)

    def peak_memory(self) -> int | None:
        peaks = self._results([actor.peak_memory.remote() for actor in self.actors])
        return max((peak for peak in peaks if peak is not None), default=None)

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def _results(self, calls: list[Any]) -> list[Any]:
        """Wait for the results of calls.

        Raises:
            MicrobatchTooLarge: A rank has run out of memory; others may wait for it.
            RankLost: A rank has died, even if another rank failed first because of it; or a rank has lost the
                connection to another, which Ray may take a minute to notice the end of.
            UserError: A rank has raised it.
            ActorError: A rank has raised another exception.
        """
        try:
            results: list[Any] = ray.get(calls)
        except RayError as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, MicrobatchTooLarge):
                raise error.cause from error
            self._raise_if_a_rank_died(error)
            if isinstance(error, RayTaskError):
                _raise_if_disconnected(error)
                raise actor_failure(error, "a learner rank") from error
            raise
        return results

    def _result(self, call: Any) -> Any:
        """Wait for the result of one call, as `_results` does."""
        return self._results([call])[0]

    def _raise_if_a_rank_died(self, error: RayError) -> None:
        for rank, actor in enumerate(self.actors):
            try:
                ray.get(actor.ready.remote(), timeout=GRACE)
            except RayActorError as death:
                where = f" on node {self.nodes[rank]}" if self.nodes else ""
                raise RankLost(f"rank {rank} of the learner has died{where}: {_cause(death)}") from error
            except GetTimeoutError:
                continue  # it is alive, and blocked in a collective with the dead rank


def _raise_if_disconnected(error: RayTaskError) -> None:
    """Raise RankLost where gloo or NCCL has failed in a rank: the peer, its node or the link to it is lost."""
    cause = error.cause
    if isinstance(cause, dist.DistError) or "gloo" in str(cause).lower():
        what = GLOO_SOURCE.sub("", first_line(cause)).partition(". ")[0]
        raise RankLost(f"a rank of the learner has lost the connection to another: {what}") from error


def _cause(death: RayActorError) -> str:
    """Why an actor is lost, in one line."""
    if isinstance(death, ActorUnavailableError):  # its text is that of a network library
        return "its process cannot be reached"
    return first_line(death)


def fetch(reference: Any) -> Any:
    """The value of a reference. Unlike `ray.get` it is pickled by its name, not with its code."""
    return ray.get(reference)


class Stored(Sequence[Value]):
    """Values in Ray's object store, each of which is fetched whenever it is read."""

    def __init__(self, references: Sequence[Any], get: Callable[[Any], Any]) -> None:
        """Refer to the values.

        Args:
            references: The reference of each value.
            get: Fetches the value of a reference.
        """
        self.references = references
        self.get = get

    def __len__(self) -> int:
        return len(self.references)

    def __getitem__(self, index: Any) -> Any:
        return self.get(self.references[index])


class _Rank:
    """The actor of one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def apply(self, compute: ComputeSettings) -> str:
        """Settle how the process computes. Returns the address of its node."""
        compute.apply()
        return str(ray.util.get_node_ip_address())

    def ready(self) -> None:
        """Return once earlier calls are done, if the process is alive."""

    def open_store(self, ranks: int) -> tuple[str, int]:
        """Open the store through which the ranks connect, on a free port. Returns its host and port."""
        host = ray.util.get_node_ip_address()
        self.store = TCPStore(host, 0, ranks, is_master=True, wait_for_workers=False)
        return host, self.store.port

    def join(self, address: tuple[str, int], ranks: int) -> None:
        """Connect to the other ranks. Rank 0 has opened the store itself."""
        host, port = address
        _use_interface_of(ray.util.get_node_ip_address())
        store = self.store if self.rank == 0 else TCPStore(host, port, ranks, is_master=False)
        dist.init_process_group(collective_backend(), store=store, rank=self.rank, world_size=ranks)

    def build(self, build: Callable[[], Any]) -> None:
        """Build the learner."""
        self.meter = MemoryMeter()
        self.learner = build()

    def peak_memory(self) -> int | None:
        """The peak memory since the learner was built, see `MemoryMeter`."""
        return self.meter.peak()

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call a method of the learner."""
        return getattr(self.learner, method)(*arguments)


def _use_interface_of(address: str) -> None:
    """Let gloo and NCCL use the network interface that has this address, unless the user has chosen one.

    By default gloo uses the address of the host name, which on Debian is 127.0.1.1, unreachable from other nodes.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without `=` every name that begins so
            return
