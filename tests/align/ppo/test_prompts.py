from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.config.ppo_settings import PpoSettings
from align.data.examples import TokenizedDemonstration
from align.ppo.prompts import PromptStream, demonstration_batches, minibatch_orders
from rollouts.trajectory import Request

COUNTS = st.integers(1, 30)
BATCHES = st.integers(1, 40)
SEEDS = st.integers(0, 99)


def stream(count: int, batch: int, seed: int = 0, samples: int = 1) -> PromptStream:
    return PromptStream([Request(f"p{n}", (n,), seed=0, columns={"n": n}) for n in range(count)], batch, samples, seed)


def orders_of(batch_size: int, minibatches: int, epochs: int, seed: int, step: int) -> list[list[list[int]]]:
    return minibatch_orders(PpoSettings(batch_size=batch_size, minibatches=minibatches, epochs=epochs), seed, step)


def drawn(count: int, batch: int, seed: int, steps: int) -> list[Request]:
    prompts = stream(count, batch, seed)
    return [request for step in range(steps) for request in prompts.requests(step)]


@given(COUNTS, BATCHES, SEEDS)
def test_every_prompt_is_used_once_a_pass(count: int, batch: int, seed: int) -> None:
    requests = drawn(count, batch, seed, steps=3 * count // batch + 1)
    for start in range(0, len(requests) - count + 1, count):
        assert sorted(request.prompt_ids for request in requests[start : start + count]) == [(n,) for n in range(count)]


@given(COUNTS, BATCHES, SEEDS)
def test_a_prompt_is_never_two_uses_ahead_of_another(count: int, batch: int, seed: int) -> None:
    uses = Counter({f"p{n}": 0 for n in range(count)})
    for request in drawn(count, batch, seed, steps=4):
        uses[str(request.prompt)] += 1
        assert max(uses.values()) - min(uses.values()) <= 1


@given(COUNTS, BATCHES, SEEDS, st.integers(0, 20))
def test_a_step_is_the_same_whatever_was_asked_before(count: int, batch: int, seed: int, step: int) -> None:
    used = stream(count, batch, seed)
    for earlier in range(step):
        used.requests(earlier)
    assert used.requests(step) == stream(count, batch, seed).requests(step)


@given(COUNTS, BATCHES, SEEDS)
def test_every_request_has_a_seed_of_its_own(count: int, batch: int, seed: int) -> None:
    requests = drawn(count, batch, seed, steps=4)
    assert len({request.seed for request in requests}) == len(requests)


def test_the_size_of_the_batch_does_not_change_the_order() -> None:
    assert drawn(20, 3, seed=0, steps=10) == drawn(20, 5, seed=0, steps=6)


def test_prompt_and_columns_stay_together() -> None:
    for request in drawn(9, 4, seed=3, steps=5):
        assert (request.prompt, request.columns) == (f"p{request.prompt_ids[0]}", {"n": request.prompt_ids[0]})


def test_each_pass_has_an_order_of_its_own() -> None:
    microbatches = [[request.prompt for request in stream(30, 30).requests(step)] for step in range(3)]
    assert len({tuple(order) for order in microbatches}) == 3


def test_another_seed_has_another_order_and_other_seeds() -> None:
    first, second = stream(30, 30, seed=0).requests(0), stream(30, 30, seed=1).requests(0)
    assert [request.prompt for request in first] != [request.prompt for request in second]
    assert not {request.seed for request in first} & {request.seed for request in second}


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4), SEEDS, st.integers(0, 50))
def test_minibatches_cover_the_batch_once_an_epoch(size: int, count: int, epochs: int, seed: int, step: int) -> None:
    orders = orders_of(size * count, count, epochs, seed, step)
    assert len(orders) == epochs
    for minibatches in orders:
        assert [len(minibatch) for minibatch in minibatches] == [size] * count
        assert sorted(row for minibatch in minibatches for row in minibatch) == list(range(size * count))


@given(SEEDS, st.integers(0, 50))
def test_the_same_seed_gives_the_same_minibatches(seed: int, step: int) -> None:
    assert orders_of(32, 4, 2, seed, step) == orders_of(32, 4, 2, seed, step)


@pytest.mark.parametrize(("seed", "step"), [(1, 0), (0, 1)])
def test_another_seed_or_step_gives_other_minibatches(seed: int, step: int) -> None:
    assert orders_of(32, 4, 2, seed, step) != orders_of(32, 4, 2, 0, 0)


def test_each_epoch_has_an_order_of_its_own() -> None:
    first, second = orders_of(32, 4, 2, seed=0, step=0)
    assert first != second


def test_samples_of_a_prompt_stand_side_by_side_with_seeds_of_their_own() -> None:
    first, second = (stream(5, batch=12, samples=4).requests(step) for step in (0, 1))
    prompts = [request.prompt for request in first + second]
    assert all(len(set(prompts[start : start + 4])) == 1 for start in range(0, 24, 4))
    assert len(set(prompts)) == 5  # six groups of five prompts: all are used before one comes again
    assert len({request.seed for request in first + second}) == 24


def test_demonstrations_are_dealt_to_each_optimizer_step_all_of_them_before_one_comes_again() -> None:
    rows = [TokenizedDemonstration([n, n], [(1, 2)]) for n in range(20)]
    ppo = PpoSettings(batch_size=8, minibatches=2, epochs=3, ptx_coefficient=0.1)
    batches = demonstration_batches(rows, ppo, seed=0, step=4)
    assert [len(batch) for batch in batches] == [4] * 6
    dealt = [row.prompt_ids[0] for batch in batches for row in batch]
    assert sorted(dealt[:20]) == list(range(20))
    assert demonstration_batches(rows, ppo, seed=0, step=5) != batches
    assert demonstration_batches(rows, PpoSettings(), seed=0, step=4) == []


def test_fewer_demonstrations_than_a_minibatch_come_again() -> None:
    ppo = PpoSettings(batch_size=8, minibatches=1, epochs=1, ptx_coefficient=0.1)
    ((*rows,),) = demonstration_batches(
        [TokenizedDemonstration([n, n], [(1, 2)]) for n in range(3)], ppo, seed=0, step=0
    )
    assert sorted(Counter(row.prompt_ids[0] for row in rows).values()) == [2, 3, 3]
