"""Where a run's actors run: what each of them reserves, computed from the settings before anything is loaded.

    groups    bundles of resources that Ray reserves on nodes: a placement group for each kind of actor
    seats     the actors by kind, each with its bundle and its share of it

Ranks have whole GPUs: NCCL refuses two of them on one. Workers have GPUs of their own, shares of GPUs, or shares of the
ranks' GPUs.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from align.config.schema import Experiment, LearnerSettings
from align.resources.actors import RANK, WORKER
from align.runtime.wording import counted
from policies.errors import UserError
from policies.schema import ActorSettings, listed
from rollouts.schema import RolloutSettings

CPU = "CPU"
GPU = "GPU"
"""Ray's names of these resources."""

SHARE_DIGITS = 4
"""Ray counts resources in ten-thousandths."""

Resources = dict[str, float]


@dataclass(frozen=True)
class Node:
    """What a node of the cluster offers.

    Attributes:
        address: Its address.
        resources: Its CPUs, GPUs and custom resources by Ray's names.
    """

    address: str
    resources: Mapping[str, float]


@dataclass(frozen=True)
class Seat:
    """Where one actor runs.

    Attributes:
        group: The index of its group.
        bundle: The index of its bundle in the group.
        resources: What it takes of the bundle.
    """

    group: int
    bundle: int
    resources: Resources


@dataclass(frozen=True)
class Group:
    """Bundles that are placed by one strategy.

    Attributes:
        bundles: What each bundle reserves, on one node.
        strategy: How they are distributed over nodes.
        label_selector: Labels that their nodes must have.
    """

    bundles: tuple[Resources, ...]
    strategy: str
    label_selector: Mapping[str, str]


@dataclass(frozen=True)
class Placement:
    """The groups, the seats of each kind of actor, and a description of them."""

    groups: tuple[Group, ...]
    seats: dict[str, tuple[Seat, ...]]
    description: str

    def uses_gpus(self, kinds: Iterable[str]) -> bool:
        """Whether actors of these kinds have GPUs."""
        return any(GPU in self.seats[kind][0].resources for kind in kinds)


def place(experiment: Experiment, actors: Mapping[str, int], gpus: int) -> Placement:
    """Decide what each actor reserves.

    Args:
        experiment: The settings.
        actors: The number of actors of each kind.
        gpus: Number of GPUs in the cluster.

    Raises:
        UserError: One half of PPO is to use GPUs in actors, and the other half runs in the controller; or workers
            are to share GPUs that the ranks do not have.
    """
    learner = experiment.learner
    rollouts = experiment.rollouts
    rank_gpus = _rank_gpus(learner, actors, gpus)
    worker_gpus = _worker_gpus(rollouts, actors, gpus - rank_gpus * actors.get(RANK, 0), rank_gpus)
    _refuse_gpus_beside_controller(experiment, rank_gpus, worker_gpus)
    descriptions = []
    groups = []
    seats: dict[str, tuple[Seat, ...]] = {}
    if ranks := actors.get(RANK):
        own = _resources(learner, rank_gpus)
        groups.append(Group((own,) * ranks, learner.strategy, learner.label_selector))
        seats[RANK] = _seats(group=0, count=ranks, resources=own)
        descriptions.append(_describe(RANK, ranks, own, learner.strategy))
    if not (workers := actors.get(WORKER)):
        return Placement(tuple(groups), seats, "; ".join(descriptions))
    if worker_gpus == "shared":
        return _share_gpus(groups[0], seats[RANK], workers, rollouts)
    own = _resources(rollouts, worker_gpus)
    seats[WORKER] = _seats(group=len(groups), count=workers, resources=own)
    groups.append(Group((own,) * workers, rollouts.strategy, rollouts.label_selector))
    descriptions.append(_describe(WORKER, workers, own, rollouts.strategy))
    return Placement(tuple(groups), seats, "; ".join(descriptions))


def _rank_gpus(learner: LearnerSettings, actors: Mapping[str, int], gpus: int) -> int:
    """GPUs of each rank."""
    if RANK not in actors:
        return 0
    if learner.gpus is not None:
        return learner.gpus
    return 1 if gpus else 0


def _worker_gpus(rollouts: RolloutSettings, actors: Mapping[str, int], left: int, rank_gpus: int) -> float | str:
    """GPUs of each worker, or `shared`: a share of the ranks' GPUs.

    Args:
        rollouts: The settings of the workers.
        actors: The number of actors by kind.
        left: The GPUs that the ranks leave.
        rank_gpus: GPUs of each rank.
    """
    if WORKER not in actors:
        return 0.0
    if rollouts.gpus == "shared" and not rank_gpus:
        raise UserError("rollouts.gpus shared: no learner rank has a GPU to share: set learner.ranks and learner.gpus")
    if rollouts.gpus is not None:
        return rollouts.gpus
    if left > 0:
        return _share(math.ceil(actors[WORKER] / left))
    return "shared" if rank_gpus else 0.0


def _share(processes: int) -> float:
    """The share of a GPU that each of several processes on it has, rounded down."""
    scale = 10**SHARE_DIGITS
    return scale // processes / scale


def _refuse_gpus_beside_controller(experiment: Experiment, rank_gpus: int, worker_gpus: float | str) -> None:
    """Raise UserError where PPO's other half would compute in the controller, which has no GPU beside such actors."""
    if "ppo" not in experiment.stages:
        return
    if worker_gpus and not experiment.learner.ranks:
        raise UserError(
            "learner.ranks 0: PPO's learner would run in the controller, which leaves the GPUs to the rollout workers: "
            "set learner.ranks to 1 or more, or rollouts.gpus to 0"
        )
    if rank_gpus and experiment.learner.ranks and not experiment.rollouts.workers:
        raise UserError(
            "rollouts.workers 0: the controller would generate, and it leaves the GPUs to the learner's ranks: set "
            "rollouts.workers to 1 or more, or learner.gpus to 0"
        )


def _resources(settings: ActorSettings, gpus: float | str) -> Resources:
    """What an actor reserves."""
    resources: Resources = {CPU: settings.cpus or 1, **settings.resources}
    if isinstance(gpus, int | float) and gpus:
        resources[GPU] = gpus
    return resources


def _seats(group: int, count: int, resources: Resources) -> tuple[Seat, ...]:
    return tuple(Seat(group, bundle, resources) for bundle in range(count))


def _share_gpus(ranks: Group, seats: Sequence[Seat], workers: int, rollouts: RolloutSettings) -> Placement:
    """Put the workers into the ranks' bundles by turns. All processes of a bundle have equal shares of its GPU.

    Args:
        ranks: The group of the ranks.
        seats: Their seats.
        workers: Number of workers.
        rollouts: The settings of the workers.

    Raises:
        UserError: Ranks and workers must be on nodes with different values of one label.
    """
    _refuse_other_labels(ranks.label_selector, rollouts.label_selector)
    count = len(seats)
    own = _resources(rollouts, 0)
    bundles = [dict(bundle) for bundle in ranks.bundles]
    guests = [0] * count
    for worker in range(workers):
        guests[worker % count] += 1
        for name, amount in own.items():
            bundle = bundles[worker % count]
            bundle[name] = bundle.get(name, 0) + amount
    shared_ranks = []
    for seat, others in zip(seats, guests, strict=True):
        shared_ranks.append(Seat(seat.group, seat.bundle, seat.resources | {GPU: _share(1 + others)}))
    shared_workers = []
    for worker in range(workers):
        bundle_index = worker % count
        resources = own | {GPU: _share(1 + guests[bundle_index])}
        shared_workers.append(Seat(0, bundle_index, resources))
    group = Group(tuple(bundles), ranks.strategy, dict(ranks.label_selector) | rollouts.label_selector)
    description = (
        f"{_describe(RANK, count, seats[0].resources, ranks.strategy)}; {counted(workers, WORKER)} on the ranks' GPUs, "
        f"each with {_amounts(own)}"
    )
    return Placement((group,), {RANK: tuple(shared_ranks), WORKER: tuple(shared_workers)}, description)


def _refuse_other_labels(ranks: Mapping[str, str], workers: Mapping[str, str]) -> None:
    for name in ranks.keys() & workers.keys():
        if ranks[name] != workers[name]:
            raise UserError(
                f"rollouts.label_selector: {name} is {workers[name]!r}, and {ranks[name]!r} in learner.label_selector: "
                "workers that share the ranks' GPUs are on their nodes: remove one of the two"
            )


def _describe(kind: str, count: int, resources: Resources, strategy: str) -> str:
    """Such as `2 learner ranks, each with 1 CPU and 1 GPU (PACK)`."""
    each = ", each" if count > 1 else ""
    return f"{counted(count, kind)}{each} with {_amounts(resources)} ({strategy})"


def _amounts(resources: Mapping[str, float]) -> str:
    """Resources in words, such as `2 CPUs and 0.5 GPU`."""
    words = []
    for name, amount in sorted(resources.items(), key=lambda item: (item[0] != CPU, item[0] != GPU)):
        plural = "s" if name in (CPU, GPU) and amount > 1 else ""
        words.append(f"{amount:g} {name}{plural}")
    return listed(words)


def describe_nodes(nodes: Sequence[Node]) -> str:
    """What the nodes offer, such as `2 nodes: 10.0.0.1 (4 CPUs), 10.0.0.2 (4 CPUs and 1 GPU)`."""
    words = []
    for node in nodes:
        words.append(f"{node.address} ({_amounts(node.resources) if node.resources else 'nothing'})")
    return f"{counted(len(nodes), 'node')}: {', '.join(words)}"


def total(nodes: Sequence[Node], name: str) -> float:
    """How much of a resource all nodes offer together."""
    return sum(node.resources.get(name, 0) for node in nodes)


def has_room(placement: Placement, nodes: Sequence[Node]) -> bool:
    """Whether empty nodes have room for all bundles, put one after another where they first fit.

    It knows nothing of labels and of the strategies that begin with STRICT.
    """
    free = [dict(node.resources) for node in nodes]
    for group in placement.groups:
        for bundle in group.bundles:
            if not _take(bundle, free):
                return False
    return True


def _take(bundle: Resources, free: Sequence[Resources]) -> bool:
    """Take a bundle from the first node that has all of it. Returns False where none has."""
    for node in free:
        if all(node.get(name, 0) >= amount for name, amount in bundle.items()):
            for name, amount in bundle.items():
                node[name] = node.get(name, 0) - amount
            return True
    return False


def describe_fit(experiment: Experiment, actors: Mapping[str, int], nodes: Sequence[Node]) -> str:
    """Where the actors of a run will be on the nodes of a cluster, or that there is no room for them."""
    if not actors:
        return f"no actors; {describe_nodes(nodes)}"
    placement = place(experiment, actors, int(total(nodes, GPU)))
    if has_room(placement, nodes):
        return f"{placement.description}; on {describe_nodes(nodes)}"
    wait = f"and cluster.wait is {experiment.cluster.wait:g} s"
    return f"{placement.description}; they do not fit on {describe_nodes(nodes)}, {wait}"


def no_room(experiment: Experiment, placement: Placement, nodes: Sequence[Node]) -> str:
    """The message where this machine, which does not grow, has no room for the actors."""
    return f"this machine has no room for {placement.description}: {describe_nodes(nodes)}. {advice(experiment)}"


def advice(experiment: Experiment) -> str:
    """What to set where there is no room for the actors."""
    waiting = ", or raise cluster.wait where nodes join later" if experiment.cluster.address_to_join else ""
    return (
        "Set rollouts.workers, the `ranks` of learner, sft and reward, and what each reserves (`cpus`, `gpus`, "
        f"`resources`) to what there is{waiting}"
    )
