"""What each actor reserves, computed without a cluster."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.config.schema import Experiment
from align.resources.actors import most_actors
from align.resources.placement import CPU, GPU, Node, Placement, Resources, describe_nodes, has_room, no_room, place
from policies.errors import UserError

RANK = "learner rank"
WORKER = "rollout worker"


def experiment(ranks: int, workers: int, **sections: Any) -> Experiment:
    settings: dict[str, Any] = {"name": "x", "model": {"path": "x"}, "ppo": {"batch_size": 128}}
    settings["learner"] = {"ranks": ranks} | sections.pop("learner", {})
    settings["rollouts"] = {"workers": workers, "chunk_size": 8} | sections.pop("rollouts", {})
    return Experiment.model_validate(settings | sections)


def placed(gpus: int, settings: Experiment) -> Placement:
    return place(settings, most_actors(settings, settings.stages), gpus)


def amounts(placement: Placement, kind: str, name: str) -> list[float]:
    """What each actor of a kind takes of a resource."""
    return [seat.resources.get(name, 0) for seat in placement.seats.get(kind, ())]


def test_workers_on_the_ranks_gpus_cannot_need_other_nodes() -> None:
    labels = {"learner": {"label_selector": {"zone": "a", "disk": "fast"}}}
    both = experiment(1, 1, rollouts={"gpus": "shared", "label_selector": {"zone": "a", "net": "fast"}}, **labels)
    assert placed(1, both).groups[0].label_selector == {"zone": "a", "disk": "fast", "net": "fast"}
    other = experiment(1, 1, rollouts={"gpus": "shared", "label_selector": {"zone": "b"}}, **labels)
    with pytest.raises(UserError, match=r"^rollouts\.label_selector: zone is 'b', and 'a' in learner\.label_selector"):
        placed(1, other)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_ranks_have_a_gpu_each_and_workers_one_of_the_others(ranks: int, workers: int) -> None:
    placement = placed(8, experiment(ranks, workers))
    assert amounts(placement, RANK, GPU) == [1] * ranks
    assert amounts(placement, WORKER, GPU) == [1] * workers
    learner, rollouts = placement.groups
    assert (learner.strategy, rollouts.strategy) == ("PACK", "SPREAD")
    assert learner.bundles == ({CPU: 1, GPU: 1},) * ranks
    assert rollouts.bundles == ({CPU: 1, GPU: 1},) * workers


@pytest.mark.parametrize(("gpus", "workers", "share"), [(3, 2, 0.5), (4, 3, 0.5), (3, 3, 0.3333), (5, 3, 1)])
def test_workers_share_the_gpus_that_the_ranks_leave(gpus: int, workers: int, share: float) -> None:
    assert amounts(placed(gpus, experiment(2, workers)), WORKER, GPU) == [share] * workers


@pytest.mark.parametrize("rollouts", [{}, {"gpus": "shared"}])
def test_workers_share_the_gpus_of_the_ranks_where_these_leave_none_or_it_is_set(rollouts: dict[str, Any]) -> None:
    placement = placed(2, experiment(2, 3, rollouts=rollouts))
    (group,) = placement.groups
    assert group.bundles == ({CPU: 3.0, GPU: 1.0}, {CPU: 2.0, GPU: 1.0})
    assert [seat.bundle for seat in placement.seats[WORKER]] == [0, 1, 0]
    assert amounts(placement, RANK, GPU) == [0.3333, 0.5]
    assert amounts(placement, WORKER, GPU) == [0.3333, 0.5, 0.3333]
    assert placement.description == (
        "2 learner ranks, each with 1 CPU and 1 GPU (PACK); 3 rollout workers on the ranks' GPUs, each with 1 CPU"
    )


@given(ranks=st.integers(1, 8), workers=st.integers(1, 16), cpus=st.integers(1, 4))
def test_the_seats_of_a_bundle_never_take_more_than_it_has(ranks: int, workers: int, cpus: int) -> None:
    settings = experiment(ranks, workers, rollouts={"gpus": "shared", "cpus": cpus}, learner={"gpus": 1})
    placement = placed(ranks, settings)
    taken: list[Resources] = [{} for _ in placement.groups[0].bundles]
    for seats in placement.seats.values():
        for seat in seats:
            for name, amount in seat.resources.items():
                taken[seat.bundle][name] = taken[seat.bundle].get(name, 0) + amount
    for own, bundle in zip(taken, placement.groups[0].bundles, strict=True):
        assert own[CPU] == bundle[CPU]
        assert 0.99 < own[GPU] <= bundle[GPU]


def test_without_gpus_or_where_none_are_wanted_actors_compute_on_cpus() -> None:
    assert amounts(placed(0, experiment(2, 2)), RANK, GPU) == [0, 0]
    assert amounts(placed(0, experiment(2, 2)), WORKER, GPU) == [0, 0]
    none = placed(8, experiment(2, 2, learner={"gpus": 0}, rollouts={"gpus": 0}))
    assert amounts(none, RANK, GPU) + amounts(none, WORKER, GPU) == [0] * 4


def test_the_largest_number_of_ranks_of_any_stage_is_reserved() -> None:
    assert len(placed(0, experiment(1, 0, sft={"ranks": 3})).seats[RANK]) == 3


def test_cpus_resources_labels_and_strategies_are_the_users() -> None:
    learner = {"cpus": 4, "resources": {"fast_disk": 0.5}, "label_selector": {"zone": "a"}, "strategy": "STRICT_PACK"}
    placement = placed(4, experiment(2, 1, learner=learner, rollouts={"cpus": 2, "strategy": "PACK"}))
    ranks, workers = placement.groups
    assert ranks.bundles == ({CPU: 4, GPU: 1, "fast_disk": 0.5},) * 2
    assert (ranks.strategy, ranks.label_selector) == ("STRICT_PACK", {"zone": "a"})
    assert (workers.bundles, workers.strategy) == (({CPU: 2, GPU: 1},), "PACK")
    assert "4 CPUs, 1 GPU and 0.5 fast_disk (STRICT_PACK)" in placement.description


@pytest.mark.parametrize(
    ("ranks", "workers", "sections", "message"),
    [
        (0, 1, {}, "learner.ranks 0: .*set learner.ranks to 1 or more, or rollouts.gpus to 0"),
        (1, 0, {}, "rollouts.workers 0: .*set rollouts.workers to 1 or more, or learner.gpus to 0"),
        (0, 1, {"rollouts": {"gpus": "shared"}}, "no learner rank has a GPU to share"),
    ],
)
def test_the_controller_does_not_compute_beside_actors_on_gpus(
    ranks: int, workers: int, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        placed(2, experiment(ranks, workers, **sections))


@pytest.mark.parametrize("gpus", [0.5, 2, -1])
def test_a_rank_has_a_whole_gpu_or_none(gpus: float) -> None:
    with pytest.raises(ValueError, match=r"a rank computes on one GPU \(1\) or on CPUs \(0\)"):
        experiment(1, 1, learner={"gpus": gpus})


@pytest.mark.parametrize(("gpus", "message"), [(1.5, "1 or 2"), (-1, "≥ 0"), ("some", "or shared")])
def test_a_worker_has_a_share_of_a_gpu_or_whole_ones(gpus: float | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        experiment(1, 1, rollouts={"gpus": gpus})


def test_bundles_fit_where_a_node_has_all_of_one() -> None:
    placement = placed(4, experiment(2, 2, learner={"cpus": 3}))
    big, small = Node("10.0.0.1", {CPU: 8, GPU: 2}), Node("10.0.0.2", {CPU: 2, GPU: 2})
    assert has_room(placement, [big, small])
    assert not has_room(placement, [small, small, small])  # enough in all, but no node has three CPUs
    assert not has_room(placement, [big])
    with_less = Node("10.0.0.2", {CPU: 2})
    assert not has_room(placement, [big, with_less])


def test_the_message_says_what_is_asked_for_and_what_there_is() -> None:
    settings = experiment(4, 0, learner={"gpus": 1}, stages=["sft"])
    nodes = [Node("10.0.0.1", {CPU: 8, GPU: 1}), Node("10.0.0.2", {CPU: 1})]
    assert describe_nodes(nodes) == "2 nodes: 10.0.0.1 (8 CPUs and 1 GPU), 10.0.0.2 (1 CPU)"
    message = no_room(settings, placed(1, settings), nodes)
    assert message.startswith("this machine has no room for 4 learner ranks, each with 1 CPU and 1 GPU (PACK): 2 nodes")
    assert "Set rollouts.workers, the `ranks` of learner, sft and reward" in message
