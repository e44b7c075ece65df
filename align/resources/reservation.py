"""Reserves in the Ray cluster what all actors of a run need, before the first of them starts."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import NodeDiedError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from align.config.schema import Experiment
from align.resources.actors import RANK
from align.resources.placement import (
    CPU,
    GPU,
    Node,
    Placement,
    Seat,
    advice,
    describe_nodes,
    has_room,
    no_room,
    place,
    total,
)
from policies.device import ActorOptions, ComputeSettings
from policies.errors import UserError
from policies.schema import listed

LOOK_SECONDS = 0.05
"""How often the state of the groups is asked for."""
PATIENCE_SECONDS = 3.0
"""After this wait, the user is told what the run waits for."""
SETTLE_SECONDS = 1.0
"""In this time all nodes have reported what a removed group has given back."""
LOCK = "reservation"
NAMESPACE = "align"
"""The name and namespace of the actor that is the lock of a cluster's reservations."""
INTERNAL = ("node:", "memory", "object_store_memory", "accelerator_type:")
"""What the names of resources begin with that Ray adds by itself."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reservation:
    """The seats of a run's actors on the nodes of the cluster.

    Attributes:
        experiment: The settings.
        placement: The groups and the seats.
        groups: Ray's placement groups, which end with this process.
    """

    experiment: Experiment
    placement: Placement
    groups: Sequence[PlacementGroup]

    def uses_gpus(self, kinds: Iterable[str]) -> bool:
        """Whether actors of these kinds have GPUs."""
        return self.placement.uses_gpus(kinds)

    def actors(self, kind: str, count: int | None = None) -> list[ActorOptions]:
        """The options of the actors of a kind, in order.

        Args:
            kind: The kind of actor.
            count: How many; None: all that have a seat.

        Raises:
            UserError: Bundles were on a node that is lost, and no other node has had room for them within
                `cluster.wait`.
        """
        self.await_room()
        seats = self.placement.seats[kind][:count]
        nodes = [self._node_of(seat) for seat in seats]
        settings = self.experiment.learner if kind == RANK else self.experiment.rollouts
        cluster = self.experiment.cluster
        options = []
        for seat, node in zip(seats, nodes, strict=True):
            compute = ComputeSettings(
                threads=cluster.threads or settings.cpus or cluster.threads_of_environment,
                deterministic=self.experiment.deterministic,
                processes=nodes.count(node),
                gpu=GPU in seat.resources,
            )
            options.append(ActorOptions(compute, self._options(seat)))
        return options

    def nodes(self, kind: str) -> set[str]:
        """The ids of the nodes of a kind's actors."""
        return {self._node_of(seat) for seat in self.placement.seats[kind]}

    def await_room(self) -> None:
        """Wait until all bundles have a node; some have none after theirs was lost.

        Raises:
            UserError: No node has had room for them within `cluster.wait`.
        """
        self.wait(time.monotonic() + self.experiment.cluster.wait)

    def wait(self, deadline: float) -> None:
        """Wait until all bundles have a node.

        Args:
            deadline: When to give up, by the monotonic clock.

        Raises:
            NodeDiedError: The node on this machine has died, of a cluster that has no other.
            UserError: The cluster has had no room for them until then.
        """
        started = time.monotonic()
        told = False
        while any(placement_group_table(group)["state"] != "CREATED" for group in self.groups):
            if not self.experiment.cluster.address_to_join and not cluster_nodes():
                raise NodeDiedError("its only node, on this machine, has died")
            now = time.monotonic()
            if now > deadline:
                raise UserError(self._no_room())
            if now - started > PATIENCE_SECONDS and not told:
                told = True
                seconds = f"up to {deadline - started:.0f} s (cluster.wait)"
                log.warning("waiting %s for %s: %s", seconds, self.placement.description, _cluster_in_words())
            time.sleep(LOOK_SECONDS)

    def release(self) -> None:
        """Give everything back, which the end of this process does, too."""
        for group in self.groups:
            remove_placement_group(group)

    def _no_room(self) -> str:
        self.release()
        time.sleep(SETTLE_SECONDS)
        wait = self.experiment.cluster.wait
        return (
            f"cluster.wait: for {wait:g} s the cluster has had no room for {self.placement.description}: "
            f"{_cluster_in_words()}. {advice(self.experiment)}"
        )

    def _node_of(self, seat: Seat) -> str:
        """The id of a seat's node."""
        nodes: dict[int, str] = placement_group_table(self.groups[seat.group])["bundles_to_node_id"]
        return nodes[seat.bundle]

    def _options(self, seat: Seat) -> dict[str, Any]:
        """What Ray's `options` takes."""
        custom = {name: amount for name, amount in seat.resources.items() if name not in (CPU, GPU)}
        return {
            "num_cpus": seat.resources[CPU],
            "num_gpus": seat.resources.get(GPU, 0),
            "resources": custom,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self.groups[seat.group], placement_group_bundle_index=seat.bundle
            ),
        }


def reserve(experiment: Experiment, actors: Mapping[str, int]) -> Reservation:
    """Reserve what actors need. Ray must be initialized.

    Runs on one cluster reserve one at a time, so that no two of them hold half of what each needs.

    Args:
        experiment: The settings.
        actors: The number of actors of each kind.

    Raises:
        UserError: The cluster has had no room for all of them within `cluster.wait`.
    """
    nodes = cluster_nodes()
    placement = place(experiment, actors, int(total(nodes, GPU)))
    deadline = time.monotonic() + experiment.cluster.wait
    with ExitStack() as stack:
        if experiment.cluster.address_to_join:
            stack.enter_context(_lock(deadline))
        elif not has_room(placement, nodes):  # and this machine does not grow
            raise UserError(no_room(experiment, placement, nodes))
        return _create(experiment, placement, deadline)


def _create(experiment: Experiment, placement: Placement, deadline: float) -> Reservation:
    """Create the placement groups and wait for all of them; none is kept where one fails."""
    groups = []
    for group in placement.groups:
        selectors = [dict(group.label_selector)] * len(group.bundles) if group.label_selector else None
        groups.append(placement_group(list(group.bundles), group.strategy, bundle_label_selector=selectors))
    reservation = Reservation(experiment, placement, groups)
    try:
        reservation.wait(deadline)
    except BaseException:
        reservation.release()
        raise
    return reservation


class _Lock:
    """An actor whose name exists once in a cluster; it ends with the process that has started it."""


@contextmanager
def _lock(deadline: float) -> Iterator[None]:
    """Hold the lock of the cluster's reservations within the block.

    Raises:
        UserError: Other runs have held it until the deadline.
    """
    while True:
        try:
            holder = ray.remote(_Lock).options(name=LOCK, namespace=NAMESPACE, num_cpus=0).remote()
            break
        except ValueError as error:  # the name is taken
            if time.monotonic() > deadline:
                raise UserError(
                    "cluster.wait: another run on this cluster has been waiting for room for its own actors: end it, "
                    "or set cluster.wait to more seconds"
                ) from error
            time.sleep(LOOK_SECONDS)
    try:
        yield
    finally:
        ray.kill(holder)


def cluster_nodes() -> list[Node]:
    """The nodes of the cluster that are alive, with what they have, reserved or not. Ray must be initialized."""
    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            nodes.append(Node(node["NodeManagerAddress"], visible(node["Resources"])))
    return nodes


def visible(resources: dict[str, float]) -> dict[str, float]:
    """The resources that a user knows of: without those that Ray adds by itself."""
    return {name: amount for name, amount in resources.items() if not name.startswith(INTERNAL)}


def _cluster_in_words() -> str:
    """What the nodes have, and what of it is free."""
    nodes = cluster_nodes()
    if not nodes:
        return "it has no node that is alive"
    free = ray.available_resources()
    words = [f"{free.get(name, 0):g} {name}s" for name in (CPU, GPU) if total(nodes, name)]
    return f"it has {describe_nodes(nodes)}, of which {listed(words) if words else 'no CPUs'} are free"
