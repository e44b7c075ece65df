"""States of workers and chunks, with time and events made up."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.roster import TRANSITIONS, Event, Order, Roster, State, WeightsVersion, WrongWeights

OLD, NEW = WeightsVersion(1, "a"), WeightsVersion(2, "b")


def roster(workers: int = 2, weights: WeightsVersion = OLD) -> Roster:
    """Workers that all hold these weights at time 0."""
    made = Roster(timeout=100.0, straggler_factor=4.0)
    for worker in range(workers):
        made.join(worker)
    made.update_weights(weights)
    for order in made.orders(0.0):
        made.reply(order.worker, weights, 0.0)
    return made


def chunks(orders: list[Order]) -> dict[int, int | None]:
    return {order.worker: order.task.chunk if order.task else -1 for order in orders}


def test_the_gone_stay_gone_and_only_confirmed_weights_make_healthy() -> None:
    assert TRANSITIONS[State.DEAD] == TRANSITIONS[State.RETIRED] == {}
    healing = {(state, event) for state, moves in TRANSITIONS.items() for event, to in moves.items() if to == "healthy"}
    assert {event for _, event in healing} == {Event.CONFIRMED}


def test_nobody_serves_before_it_has_confirmed_the_current_weights() -> None:
    r = roster()
    r.update_weights(NEW)
    r.begin(2)
    assert chunks(r.orders(0.0)) == {0: None, 1: None}  # load first
    assert not r.orders(0.0)
    r.reply(0, NEW, 0.1)
    assert chunks(r.orders(0.1)) == {0: 0}


def test_weights_that_were_replaced_while_loading_are_loaded_again() -> None:
    r = Roster(100.0, 4.0)
    r.join(0)
    r.update_weights(OLD)
    r.orders(0.0)
    r.update_weights(NEW)
    r.reply(0, OLD, 1.0)
    assert r.members[0].state == State.STALE
    (order,) = r.orders(1.0)
    assert order.task
    assert (order.task.weights, order.task.chunk) == (NEW, None)


def test_the_chunk_of_a_lost_worker_goes_before_all_others() -> None:
    r = roster()
    r.begin(4)
    assert chunks(r.orders(0.0)) == {0: 0, 1: 1}
    r.lose(0)
    r.reply(1, OLD, 1.0)
    assert chunks(r.orders(1.0)) == {1: 0}


def test_a_silent_worker_is_given_up() -> None:
    r = roster()
    r.begin(1)
    r.orders(0.0)
    assert not r.orders(100.0)
    (given_up, again) = r.orders(100.1)
    assert (given_up.worker, given_up.task) == (0, None)
    assert "rollouts.timeout" in given_up.why
    assert chunks([again]) == {1: 0}


def test_a_slow_worker_is_suspect_and_another_has_its_chunk_too() -> None:
    r = roster()
    r.begin(2)
    r.orders(0.0)
    assert r.reply(1, OLD, 1.0) == 1
    assert not r.orders(3.9)
    assert chunks(r.orders(4.1)) == {1: 0}
    assert r.members[0].state == State.SUSPECT
    assert not r.orders(4.2)
    assert r.reply(1, OLD, 5.0) == 0
    assert r.reply(0, OLD, 6.0) is None  # too late: not counted twice
    assert r.members[0].state == State.HEALTHY


def test_an_answer_to_an_earlier_batch_does_not_count() -> None:
    r = roster()
    r.begin(2)
    r.orders(0.0)
    r.reply(0, OLD, 1.0)
    r.lose(0)
    r.join(2)
    r.begin(2)
    r.update_weights(NEW)
    assert r.reply(1, OLD, 2.0) is None
    assert r.members[1].state == State.STALE
    assert sorted(r.waiting) == [0, 1]


def test_one_that_holds_other_weights_is_lost() -> None:
    r = roster()
    r.begin(1)
    r.orders(0.0)
    with pytest.raises(WrongWeights, match="version 1 \\(x\\)"):
        r.reply(0, WeightsVersion(1, "x"), 1.0)
    assert 0 not in r.members
    assert list(r.waiting) == [0]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_chunk_is_answered_once_whatever_happens(data: st.DataObject) -> None:
    r, new, held = Roster(10.0, 3.0), 0, {}
    for _ in range(data.draw(st.integers(1, 4))):
        r.join(new)
        held[new], new = OLD, new + 1
    now, version, busy = 0.0, 0, {}
    for _ in range(data.draw(st.integers(1, 3))):
        version += 1
        current = WeightsVersion(version, str(version))
        r.update_weights(current)
        count = data.draw(st.integers(0, 6))
        r.begin(count)
        answers: list[int] = []
        for turn in range(500):
            if len(answers) == count:
                break
            for order in r.orders(now):
                assert order.task is None or order.task.chunk is None or held[order.worker] == current
                busy.pop(order.worker, None)
                if order.task is None:
                    r.join(new)
                    held[new], new = OLD, new + 1
                else:
                    assert order.worker in r.members
                    busy[order.worker] = order.task
            calm = turn > 100  # from then on everybody answers
            now += 1.0 if calm else data.draw(st.sampled_from([0.1, 1.0, 20.0]))
            for worker, task in list(busy.items()):
                fate = "answers" if calm else data.draw(st.sampled_from(["answers", "dies", "errs", "hangs"]))
                if fate == "hangs":
                    continue
                del busy[worker]
                if fate == "answers":
                    held[worker] = task.weights
                    chunk = r.reply(worker, task.weights, now)
                    answers += [] if chunk is None else [chunk]
                    if chunk is not None and not calm and data.draw(st.booleans()):  # it is not all of an answer
                        r.add()
                        count += 1
                    continue
                if fate == "dies":
                    r.lose(worker)
                else:
                    with pytest.raises(WrongWeights):
                        r.reply(worker, WeightsVersion(task.weights.version, "other"), now)
                r.join(new)
                held[new], new = OLD, new + 1
        assert sorted(answers) == list(range(count))
