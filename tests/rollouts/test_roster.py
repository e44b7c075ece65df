"""States of workers and chunks, under simulated time and events."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.roster import TRANSITIONS, Command, Event, Roster, State, Task, WeightsVersion, WrongWeights

OLD, NEW = WeightsVersion(1, "a"), WeightsVersion(2, "b")


def state_of(roster: Roster, worker: int) -> State:
    return roster.members[worker].state


def make_roster(workers: int = 2, weights: WeightsVersion = OLD) -> Roster:
    """Workers that have all loaded these weights at time 0."""
    roster = Roster(timeout=100.0, straggler_factor=4.0)
    for worker in range(workers):
        roster.add_worker(worker)
    roster.update_weights(weights)
    for command in roster.commands(0.0):
        roster.receive_reply(command.worker, weights, 0.0)
    return roster


def chunks(commands: list[Command]) -> dict[int, int | None]:
    """By worker, the chunk that it is given; None: it loads weights; -1: it is replaced."""
    return {command.worker: command.task.chunk if command.task else -1 for command in commands}


def test_dead_and_retired_are_final_and_only_confirmed_weights_make_healthy() -> None:
    assert TRANSITIONS[State.DEAD] == TRANSITIONS[State.RETIRED] == {}
    healing: set[Event] = set()
    for transitions in TRANSITIONS.values():
        healing |= {event for event, state in transitions.items() if state == State.HEALTHY}
    assert healing == {Event.CONFIRMED}


def test_no_worker_serves_before_it_has_confirmed_the_current_weights() -> None:
    r = make_roster()
    r.update_weights(NEW)
    r.start_batch(2)
    assert chunks(r.commands(0.0)) == {0: None, 1: None}  # load first
    assert not r.commands(0.0)
    r.receive_reply(0, NEW, 0.1)
    assert chunks(r.commands(0.1)) == {0: 0}


def test_weights_that_were_replaced_while_loading_are_loaded_again() -> None:
    r = Roster(100.0, 4.0)
    r.add_worker(0)
    r.update_weights(OLD)
    r.commands(0.0)
    r.update_weights(NEW)
    r.receive_reply(0, OLD, 1.0)
    assert r.members[0].state == State.STALE
    (command,) = r.commands(1.0)
    assert command.task
    assert (command.task.weights, command.task.chunk) == (NEW, None)


def test_the_chunk_of_a_lost_worker_is_the_next_to_be_handed_out() -> None:
    r = make_roster()
    r.start_batch(4)
    assert chunks(r.commands(0.0)) == {0: 0, 1: 1}
    r.lose(0)
    r.receive_reply(1, OLD, 1.0)
    assert chunks(r.commands(1.0)) == {1: 0}


def test_a_worker_that_does_not_reply_is_given_up() -> None:
    r = make_roster()
    r.start_batch(1)
    r.commands(0.0)
    assert not r.commands(100.0)
    replacement, assignment = r.commands(100.1)
    assert (replacement.worker, replacement.task) == (0, None)
    assert "rollouts.timeout" in replacement.reason
    assert chunks([assignment]) == {1: 0}


def test_a_slow_worker_is_suspect_and_its_chunk_is_also_given_to_another() -> None:
    r = make_roster()
    r.start_batch(2)
    r.commands(0.0)
    assert r.receive_reply(1, OLD, 1.0) == 1
    assert not r.commands(3.9)
    assert chunks(r.commands(4.1)) == {1: 0}
    assert state_of(r, 0) == State.SUSPECT
    assert not r.commands(4.2)
    assert r.receive_reply(1, OLD, 5.0) == 0
    assert r.receive_reply(0, OLD, 6.0) is None  # too late: not counted twice
    assert state_of(r, 0) == State.HEALTHY


def test_a_reply_to_an_earlier_batch_does_not_count() -> None:
    r = make_roster()
    r.start_batch(2)
    r.commands(0.0)
    r.receive_reply(0, OLD, 1.0)
    r.lose(0)
    r.add_worker(2)
    r.start_batch(2)
    r.update_weights(NEW)
    assert r.receive_reply(1, OLD, 2.0) is None
    assert r.members[1].state == State.STALE
    assert sorted(r.waiting) == [0, 1]


def test_a_worker_with_other_weights_is_lost() -> None:
    r = make_roster()
    r.start_batch(1)
    r.commands(0.0)
    with pytest.raises(WrongWeights, match="version 1 \\(x\\)"):
        r.receive_reply(0, WeightsVersion(1, "x"), 1.0)
    assert 0 not in r.members
    assert list(r.waiting) == [0]


class SimulatedWorkers:
    """Workers that load, generate, die, report wrong weights and hang, as `data` draws it."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.roster = Roster(timeout=10.0, straggler_factor=3.0)
        self.loaded: dict[int, WeightsVersion] = {}
        self.busy: dict[int, Task] = {}
        self.now = 0.0

    def start_worker(self) -> None:
        worker = len(self.loaded)
        self.roster.add_worker(worker)
        self.loaded[worker] = OLD

    def carry_out_commands(self, current: WeightsVersion) -> None:
        for command in self.roster.commands(self.now):
            self.busy.pop(command.worker, None)
            if command.task is None:
                self.start_worker()
                continue
            assert command.task.chunk is None or self.loaded[command.worker] == current
            assert command.worker in self.roster.members
            self.busy[command.worker] = command.task

    def advance(self, calm: bool) -> list[int]:
        """Let some time pass. Returns the chunks completed in it; when calm, every busy worker replies."""
        self.now += 1.0 if calm else self.data.draw(st.sampled_from([0.1, 1.0, 20.0]))
        completed: list[int] = []
        for worker, task in list(self.busy.items()):
            outcome = "replies" if calm else self.data.draw(st.sampled_from(["replies", "dies", "errs", "hangs"]))
            if outcome == "hangs":
                continue
            del self.busy[worker]
            if outcome == "replies":
                self.loaded[worker] = task.weights
                chunk = self.roster.receive_reply(worker, task.weights, self.now)
                if chunk is not None:
                    completed.append(chunk)
                continue
            if outcome == "dies":
                self.roster.lose(worker)
            else:
                with pytest.raises(WrongWeights):
                    self.roster.receive_reply(worker, WeightsVersion(task.weights.version, "other"), self.now)
            self.start_worker()
        return completed


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_chunk_is_completed_once_whatever_happens(data: st.DataObject) -> None:
    workers = SimulatedWorkers(data)
    for _ in range(data.draw(st.integers(1, 4))):
        workers.start_worker()
    for version in range(1, 1 + data.draw(st.integers(1, 3))):
        current = WeightsVersion(version, str(version))
        workers.roster.update_weights(current)
        chunk_count = data.draw(st.integers(0, 6))
        workers.roster.start_batch(chunk_count)
        completed: list[int] = []
        for turn in range(500):
            if len(completed) == chunk_count:
                break
            workers.carry_out_commands(current)
            calm = turn > 100
            for chunk in workers.advance(calm):
                completed.append(chunk)
                if not calm and data.draw(st.booleans()):  # some of its responses are unfinished
                    workers.roster.add_chunk()
                    chunk_count += 1
        assert sorted(completed) == list(range(chunk_count))
